"""A sweep's best trial as a candidate, with its evidence, as a run of unlearn.py leaves it: promote.py takes it."""

from components.console import utc
from components.models import fingerprint
from components.tracking.gates import CANDIDATE
from components.tracking.spool import Spool
from components.tuning.spaces import recipe_of
from components.tuning.trials import Sweep, Trial
from pipelines.cli import say
from pipelines.evaluate import evaluate_models, score_models
from pipelines.evidence import PATIENCE, evidence_of
from pipelines.finetune import Model
from pipelines.hand_over import candidate_text, put_candidate, run_tags
from pipelines.sweeps.shared import alone, read_shared


def offer(sweep: Sweep, best: Trial, spool: Spool) -> None:
    """Have the trial's model registered, once; what it and the models to compare with said is found."""
    if not any(entry["kind"] == "model" for entry in spool.entries()):
        shared, recipe = read_shared(sweep.folder), alone(recipe_of(sweep.recipe, best.params))
        model = Model(best.folder / "model", fingerprint(best.folder / "model"))
        models = {**shared.models, CANDIDATE: model}
        records = score_models(recipe, models, shared.questions)
        evaluated = evaluate_models(recipe, models, records)
        digests = {name: digest for name, digest in shared.made_from.items() if name != "model"}
        spool.put("artifact", path=str(best.folder / "config.json"))
        put_candidate(
            spool, recipe, best.folder, evidence_of(models, evaluated, shared.questions, None),
            run_tags(recipe, models["original"].hash, digests, stage="sweep"), steps=best.steps,
            trained_at=utc((best.folder / "result.json").stat().st_mtime),
            description=f"Best of the sweep {sweep.folder.name}: {best.name}.",
        )  # fmt: skip
    spool.drain(PATIENCE)
    say(f"candidate    {candidate_text(sweep.recipe, spool)}, for promote.py with the same recipe")
