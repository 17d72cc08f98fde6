"""Evaluate and compare models on the recipe's question sets, or on those of a suite.

    python pipelines/evaluate.py pipelines/recipes/demo.yaml [MODEL ...] [suite=NAME] [section.field=value ...]
    python pipelines/evaluate.py ORIGINAL [MODEL ...] suite=tofu [section.field=value ...] [--dry-run]

Original and retain-only models of the recipe come first, then those given: folders, hub ids, or registered ones as
models:/<name>@<alias>. A suite (pipelines/suites/) says what is measured; one with questions of its own needs no
recipe. What is already scored is not scored again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from components.config import Pretrained, Recipe, registered_name
from components.data.prepare import Prepared, prepare
from components.errors import ConfigError, ModelError
from components.evaluation.evaluate import Reference, compared, evaluate_records, reference_of
from components.evaluation.exchange import read_reference
from components.evaluation.general import general_ability
from components.evaluation.judge import judged
from components.evaluation.metrics import mean_logp
from components.evaluation.report import changes_table, metrics_table
from components.evaluation.scoring import score
from components.evidence import Evaluated
from components.model_files import check_files
from components.models import check_model, fingerprint, load_tokenizer, local_folder, tokenizer_facts
from components.tracking.client import make_client
from components.tracking.promotion import fetch_registered
from pipelines.cli import Command, leave, ray_session, run_cli, say, storage_folder, tracking_uri
from pipelines.evidence import add_evidence, evidence_of, own_run
from pipelines.finetune import Model, check_context, check_inputs, check_plan, make_models
from pipelines.prepare import set_aside
from pipelines.training import telling


def run(command: Command) -> None:
    """Print one table with a column for each model."""
    recipe = with_folders(command.recipe)
    if not recipe.evaluation.sets:
        raise ConfigError("Nothing to evaluate: evaluation.sets is empty. Give at least one question set.")
    check_inputs(recipe)
    given = given_models(command)
    with ray_session(storage_folder(recipe)):
        models = compared_models(recipe, given)
        sets = prepare_questions(recipe, models["original"])
        records = score_models(recipe, models, sets)
    evaluated = evaluate_models(recipe, models, records)
    everything = recipe.evaluation.metrics is not None
    say(metrics_table({name: found.values for name, found in evaluated.items()}, everything))
    changes = {name: compared(found, evaluated["original"]) for name, found in evaluated.items() if name != "original"}
    if changes:
        say("\nminus original, with the 95 % interval of the difference on the same rows")
        say(changes_table(changes, everything))
    for name, why in {n: why for found in evaluated.values() for n, why in found.missing.items()}.items():
        say(f"not computed: {name} {why}")
    own = own_run(command)
    if own and command.suites and not command.words:
        add_evidence(recipe, own, evidence_of(models, evaluated, sets, own), "+".join(command.suites))


def plan(command: Command) -> str:
    """What would be scored, for --dry-run."""
    check_folders(command)
    models = ["original", "retain-only", *(command.words or _own_result(command))]
    return f"\nPlan: models {', '.join(models)}; sets {', '.join(command.recipe.evaluation.sets)}"


def check_folders(command: Command) -> None:
    """Refuse folders of the recipe or the command line that cannot be used, as far as their files tell it at once.

    Raises:
        ModelError: naming the folder.
    """
    check_plan(command.recipe)
    for path in map(Path, command.words):
        if path.expanduser().is_dir():
            check_files(path.expanduser())


def with_folders(recipe: Recipe) -> Recipe:
    """The recipe with a folder in place of a registered original model's name."""
    original = recipe.models.original
    if not isinstance(original, Pretrained) or not original.path.startswith("models:/"):
        return recipe
    there = original.model_copy(update={"path": str(_model_folder(recipe, original.path))})
    return recipe.model_copy(update={"models": recipe.models.model_copy(update={"original": there})})


def _model_folder(recipe: Recipe, path: str) -> Path:
    storage = storage_folder(recipe)
    if path.startswith("models:/"):
        champions = path.startswith((f"models:/{registered_name(recipe)}@", f"models:/{registered_name(recipe)}/"))
        client = make_client((champions and recipe.tracking.production) or tracking_uri(recipe))
        return fetch_registered(client, path, storage / "registered")
    return local_folder(Pretrained(type="pretrained", path=path), storage)


def given_models(command: Command) -> list[Path]:
    """Folders of the models on the command line, else of the recipe's own run."""
    if command.runs and not command.words and not _own_result(command):
        say("no finished run of this recipe is there to compare with; name models to add them")
    folders = [_model_folder(command.recipe, path) for path in command.words or _own_result(command)]
    for folder in folders:
        check_model(folder)
    return folders


def compared_models(recipe: Recipe, given: list[Path]) -> dict[str, Model]:
    """By name: the recipe's original and retain-only models, made where they are not there, and those given.

    Raises:
        ModelError: when their tokenizers differ.
    """
    models = make_models(recipe)
    for folder in given:
        name = _short_name(folder)
        models[name if name not in models else str(folder)] = Model(folder, fingerprint(folder))
    check_same_tokens(list(models.values()))
    return models


def prepare_questions(recipe: Recipe, model: Model) -> dict[str, Prepared]:
    """The recipe's question sets, tokenised."""
    check_context(recipe, model.folder)
    facts = tokenizer_facts(load_tokenizer(model.folder))
    storage = storage_folder(recipe)
    sets = {
        name: prepare(questions.rows, "questions", recipe.data, facts, storage, tell=telling(name))
        for name, questions in recipe.evaluation.sets.items()
    }
    for line in set_aside(sets):
        say(f"             {line}")
    return sets


def check_same_tokens(models: list[Model]) -> None:
    """Refuse models with another tokenizer than the first one's, which prepares the rows for all.

    Raises:
        ModelError: naming the two folders.
    """
    facts = [tokenizer_facts(load_tokenizer(model.folder)) for model in models]
    for model, its in zip(models, facts, strict=True):
        if its != facts[0]:
            raise ModelError(
                f"Models have different tokenizers (path={model.folder}, other={models[0].folder}). Expected the "
                "same one, so that their probabilities are of the same tokens."
            )


def retain_reference(recipe: Recipe, records: pa.Table | None) -> Reference | None:
    """What metrics need of the retain-only model: from its records, else from the log that the recipe names."""
    if records is not None:
        return reference_of(records)
    return read_reference(Path(recipe.evaluation.retain_log).expanduser()) if recipe.evaluation.retain_log else None


def score_models(recipe: Recipe, models: Mapping[str, Model], sets: dict[str, Prepared]) -> dict[str, pa.Table]:
    """Records of each model, of which the original comes first."""
    records: dict[str, pa.Table] = {}
    for name, model in models.items():
        records[name] = score_model(recipe, model, sets, records.get("original"))
    return records


def score_model(recipe: Recipe, model: Model, sets: dict[str, Prepared], original: pa.Table | None = None) -> pa.Table:
    """Records of one model, with what the judge and the reference model say; found again when it was scored before.

    `original` are the original model's records, where these are of another one.
    """
    evaluation, storage = recipe.evaluation, storage_folder(recipe)
    records = score(model.folder, model.hash, sets, evaluation, recipe.train, storage)
    records = records.append_column("original_generated", (records if original is None else original)["generated"])
    if evaluation.reference and original is not None:  # it says the same of the same rows
        records = records.append_column("reference_loss", original["reference_loss"])
    elif evaluation.reference:
        folder = local_folder(evaluation.reference, storage)
        reference = Model(folder, fingerprint(folder))
        check_same_tokens([model, reference])
        plain = evaluation.model_copy(update={"metrics": [], "gradient_norms": False})
        said = score(folder, reference.hash, sets, plain, recipe.train, storage)["logp"].to_pylist()
        records = records.append_column("reference_loss", pa.array([-mean_logp(logp[0]) for logp in said]))
    if evaluation.judge and records["generated"].null_count == 0:
        records = judged(records, evaluation.judge, recipe.train, storage)
    return records


def evaluate_models(
    recipe: Recipe, models: Mapping[str, Model], records: Mapping[str, pa.Table]
) -> dict[str, Evaluated]:
    """All metrics of each model of which there are records (`score_models`), by what the retain-only one said."""
    reference = retain_reference(recipe, records.get("retain-only"))
    return {name: evaluate_model(recipe, models[name], table, reference) for name, table in records.items()}


def evaluate_model(recipe: Recipe, model: Model, records: pa.Table, reference: Reference | None) -> Evaluated:
    """All metrics of a model, lm-eval's tasks included."""
    config = recipe.evaluation.lm_eval
    others = general_ability(model.folder, model.hash, config, storage_folder(recipe)) if config else {}
    return evaluate_records(records, reference, recipe.evaluation, others)


def headline(name: str, metrics: Mapping[str, float], shown: Sequence[str]) -> str:
    """Some metrics of a model in a line, as far as there are any."""
    return f"{name}: " + " ".join(f"{key} {metrics[key]:.3f}" for key in shown if key in metrics)


def _own_result(command: Command) -> list[str]:
    own = own_run(command)
    return [str(own / "model")] if own else []


def _short_name(folder: Path) -> str:
    """Of a run's model the run's name, of a long one its end, which tells runs apart."""
    name = folder.parent.name if folder.name == "model" else folder.name
    return name if len(name) <= 24 else f"…{name[-23:]}"


if __name__ == "__main__":
    leave(run_cli(__doc__, run, plan, words="models, suite=NAME"))
