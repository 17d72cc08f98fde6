"""A sweep's best trial as a candidate, with its evidence, as a run of unlearn.py leaves it: promote.py takes it."""

from components.config import registered_name
from components.console import utc
from components.models import fingerprint
from components.tracking.gates import CANDIDATE
from components.tracking.registry import candidates
from components.tracking.spool import Spool
from components.tuning.spaces import recipe_of
from components.tuning.trials import Sweep, Trial
from pipelines.cli import say
from pipelines.evaluate import evaluate_model, retain_reference, score_models
from pipelines.evidence import PATIENCE, evidence_of
from pipelines.finetune import Model
from pipelines.hand_over import put_candidate, run_tags
from pipelines.sweeps.shared import alone, read_shared


def offer(sweep: Sweep, best: Trial, spool: Spool) -> None:
    """Have the trial's model registered, once; what it and the models to compare with said is found."""
    name = candidates(registered_name(sweep.recipe))
    if not any(entry["kind"] == "model" for entry in spool.entries()):
        shared, recipe = read_shared(sweep.folder), alone(recipe_of(sweep.recipe, best.params))
        model = Model(best.folder / "model", fingerprint(best.folder / "model"))
        models = {**shared.models, CANDIDATE: model}
        records = score_models(recipe, models, shared.questions)
        reference = retain_reference(recipe, records.get("retain-only"))
        evaluated = {name: evaluate_model(recipe, models[name], table, reference) for name, table in records.items()}
        digests = {name: digest for name, digest in shared.made_from.items() if name != "model"}
        spool.put("artifact", path=str(best.folder / "config.json"))
        put_candidate(
            spool, recipe, best.folder, evidence_of(models, evaluated, shared.questions, None),
            run_tags(recipe, models["original"].hash, digests, stage="sweep"), steps=best.steps,
            trained_at=utc((best.folder / "result.json").stat().st_mtime),
            description=f"Best of the sweep {sweep.folder.name}: {best.name}.",
        )  # fmt: skip
    spool.drain(PATIENCE)
    number = spool.known.get("version")
    say(f"candidate    {name} {f'version {number}' if number else '(not sent)'}, for promote.py with the same recipe")
