"""Evaluate and compare models on the recipe's question sets.

    python pipelines/evaluate.py pipelines/recipes/demo.yaml [MODEL ...] [section.field=value ...] [--dry-run]

Original and retain-only models of the recipe come first, then those given: folders, hub ids, or registered ones as
models:/<name>@<alias>. What is already scored is not scored again.
"""

import sys
from pathlib import Path

import pyarrow as pa

from components.config import Pretrained, Recipe, run_name
from components.data.prepare import Prepared, prepare
from components.errors import ConfigError, ModelError
from components.evaluation.evaluate import Reference, evaluate_records, reference_of
from components.evaluation.exchange import read_reference
from components.evaluation.report import metrics_table
from components.evaluation.scoring import score
from components.models import fingerprint, load_tokenizer, local_folder, tokenizer_facts
from components.tracking import registry
from components.tracking.run import make_client, tracking_uri
from pipelines.cli import Command, ray_session, run_cli, say, storage_folder
from pipelines.finetune import Model, check_context, check_inputs, make_models
from pipelines.training import telling


def run(command: Command) -> None:
    """Print one table with a column for each model."""
    recipe = command.recipe
    if not recipe.evaluation.sets:
        raise ConfigError("Nothing to evaluate: evaluation.sets is empty. Give at least one question set.")
    check_inputs(recipe)
    given = given_models(command)
    with ray_session():
        models = compared_models(recipe, given)
        sets = prepare_questions(recipe, models["original"])
        records = {name: score_model(recipe, model, sets) for name, model in models.items()}
    reference = retain_reference(recipe, records.get("retain-only"))
    evaluated = {name: evaluate_records(r, reference, recipe.evaluation) for name, r in records.items()}
    say(metrics_table({name: found.values for name, found in evaluated.items()}))
    for name, why in {n: why for found in evaluated.values() for n, why in found.missing.items()}.items():
        say(f"not computed: {name} {why}")


def plan(command: Command) -> str:
    """What would be scored, for --dry-run."""
    models = ["original", "retain-only", *(command.models or _own_result(command.recipe))]
    return f"\nPlan: models {', '.join(models)}; sets {', '.join(command.recipe.evaluation.sets)}"


def given_models(command: Command) -> list[Path]:
    """Folders of the models on the command line, else of the recipe's own run."""
    recipe = command.recipe
    storage = storage_folder(recipe)

    def folder(path: str) -> Path:
        if path.startswith("models:/"):
            return registry.fetch(make_client(tracking_uri(recipe.tracking, storage)), path, storage / "registered")
        return local_folder(Pretrained(type="pretrained", path=path), storage)

    return [folder(path) for path in command.models or _own_result(recipe)]


def compared_models(recipe: Recipe, given: list[Path]) -> dict[str, Model]:
    """By name: the recipe's original and retain-only models, made where they are not there, and those given.

    Raises:
        ModelError: when their tokenizers differ.
    """
    original, retain_only = make_models(recipe)
    models = {"original": original}
    if retain_only:
        models["retain-only"] = retain_only
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
    return {
        name: prepare(questions.rows, "questions", recipe.data, facts, storage, tell=telling(name))
        for name, questions in recipe.evaluation.sets.items()
    }


def check_same_tokens(models: list[Model]) -> None:
    """Refuse models with another tokenizer than the first one's, which prepares the rows for all.

    Raises:
        ModelError: naming the two folders.
    """
    first = tokenizer_facts(load_tokenizer(models[0].folder))
    for model in models[1:]:
        if tokenizer_facts(load_tokenizer(model.folder)) != first:
            raise ModelError(
                f"Models have different tokenizers (path={model.folder}, other={models[0].folder}). Expected the "
                "same one, so that their probabilities are of the same tokens."
            )


def retain_reference(recipe: Recipe, records: pa.Table | None) -> Reference | None:
    """What metrics need of the retain-only model: from its records, else from the log that the recipe names."""
    if records is not None:
        return reference_of(records)
    return read_reference(Path(recipe.evaluation.retain_log).expanduser()) if recipe.evaluation.retain_log else None


def score_model(recipe: Recipe, model: Model, sets: dict[str, Prepared]) -> pa.Table:
    """Records of one model; found again when it was scored before."""
    return score(model.folder, model.hash, sets, recipe.evaluation, recipe.train, storage_folder(recipe))


def _own_result(recipe: Recipe) -> list[str]:
    folder = storage_folder(recipe) / run_name(recipe) / "model"
    return [str(folder)] if folder.is_dir() else []


def _short_name(folder: Path) -> str:
    """Of a run's model the run's name, of a long one its end, which tells runs apart."""
    name = folder.parent.name if folder.name == "model" else folder.name
    return name if len(name) <= 24 else f"…{name[-23:]}"


if __name__ == "__main__":
    sys.exit(run_cli(__doc__, run, plan, takes_models=True))
