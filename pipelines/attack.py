"""Try to get back what was forgotten: relearning, quantisation, prompts that push.

    python pipelines/attack.py pipelines/recipes/demo.yaml [MODEL_FOLDER ...] [section.field=value ...] [--dry-run]

Prints what each model says of the forget questions after each of the recipe's `attacks`: the recipe's original and
retain-only models, and the folders given, else the recipe's own run. What is scored already is not scored again.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.config import Nll, Objective, Recipe, Relearn, Source, Text, digest
from components.console import number, table
from components.data.prepare import Prepared, prepare
from components.data.rows import PreparedRows
from components.data.streams import draw
from components.errors import ConfigError, DataError
from components.evaluation.attacks import asked_by, part_left_out, prefixed, quantise, shots_prefix
from components.evaluation.evaluate import evaluate_records
from components.evidence import Evaluated
from components.models import context_length, fingerprint, load_tokenizer, tokenizer_facts
from components.training.job import Job
from components.training.launch import run_job
from pipelines.cli import Command, leave, ray_session, run_cli, say, storage_folder
from pipelines.evaluate import (
    check_folders,
    compared_models,
    given_models,
    prepare_questions,
    score_model,
    with_folders,
)
from pipelines.evidence import add_evidence, evidence_of, own_run
from pipelines.finetune import Model, check_inputs
from pipelines.training import telling

_SHOWN = ("probability", "rouge")


def run(command: Command) -> None:
    """Print one table with a row for each attack and a column for each model."""
    recipe = with_folders(command.recipe)
    if "forget" not in recipe.evaluation.sets:
        raise ConfigError("Nothing to attack: evaluation.sets has no set named forget. Give its questions.")
    check_inputs(recipe)
    given = given_models(command)
    with ray_session(storage_folder(recipe)):
        models = compared_models(recipe, given)
        questions = {"forget": prepare_questions(recipe, models["original"])["forget"]}
        rows = {"none": [_score(recipe, model, questions) for model in models.values()]}
        for name, prefix in recipe.attacks.prefixes.items():
            pushed = {
                "forget": _changed_questions(recipe, models["original"], functools.partial(prefixed, prefix=prefix))
            }
            rows[f"prompt: {name}"] = [_score(recipe, model, pushed) for model in models.values()]
        if column := recipe.attacks.paraphrased:
            other = {"forget": _changed_questions(recipe, models["original"], lambda s: asked_by(s, column))}
            rows["paraphrased"] = [_score(recipe, model, other) for model in models.values()]
        if recipe.attacks.shots:
            try:
                asked, told = _asked_after_examples(recipe, models["original"], questions["forget"])
                rows[f"{len(told)} examples"] = [_score(recipe, m, asked, told) for m in models.values()]
            except DataError as error:
                say(f"  examples   not tried: {error}")
        labels: dict[str, str] = {}
        for bits in recipe.attacks.bits:
            name = f"{bits}-bit weights"
            shares: list[float] = []
            change = functools.partial(_quantise, bits, shares)
            rows[name] = [_changed(recipe, model, questions, change) for model in models.values()]
            labels[name] = f"{name}, {min(shares):.0%} of the blocks"
        relearn = recipe.attacks.relearn
        for steps in relearn.steps if relearn else []:
            assert relearn is not None
            change = functools.partial(_relearn, recipe, relearn, steps)
            name = f"relearn {relearn.share:.0%}, {steps} steps"
            rows[name] = [_changed(recipe, model, questions, change) for model in models.values()]
    for metric in _SHOWN:
        say(f"\nforget {metric}, lower is better")
        cells = [
            [labels.get(name, name), *(number(f.values[f"forget_{metric}"]) for f in found)]
            for name, found in rows.items()
        ]
        say(table(["attack", *models], cells))
    own = own_run(command)
    if own and not command.words:
        attacked = {
            model: _together({name: found[i] for name, found in rows.items()}) for i, model in enumerate(models)
        }
        add_evidence(recipe, own, evidence_of(models, attacked, questions, own), "attacks")


def plan(command: Command) -> str:
    """What would be tried, for --dry-run."""
    check_folders(command)
    attacks = command.recipe.attacks
    relearned = f"relearning after {attacks.relearn.steps} steps" if attacks.relearn else "no relearning"
    prompts = f"prompts {', '.join(attacks.prefixes) or 'none'}; {attacks.shots} examples"
    return f"\nPlan: {prompts}; bits {attacks.bits}; {relearned}"


def _together(rows: Mapping[str, Evaluated]) -> Evaluated:
    """What was found of one model after each attack, as metrics `<attack>/<metric>`."""

    def part(i: int) -> dict[str, Any]:
        return {f"{attack}/{metric}": value for attack, found in rows.items() for metric, value in found[i].items()}

    return Evaluated(*map(part, range(len(Evaluated._fields))))


def _score(recipe: Recipe, model: Model, questions: dict[str, Prepared], told: Sequence[str] = ()) -> Evaluated:
    """Metrics of the forget set, without the questions that end with one of `told`."""
    nothing_else = {"judge": None, "reference": None, "gradient_norms": False, "samples": 0, "lm_eval": None}
    asked = {"utility": [], "metrics": [f"forget_{metric}" for metric in _SHOWN], **nothing_else}
    evaluation = recipe.evaluation.model_copy(update=asked)
    records = score_model(recipe.model_copy(update={"evaluation": evaluation}), model, questions)
    kept = [not question.endswith(tuple(told)) for question in records["question"].to_pylist()]
    return evaluate_records(records.filter(pa.array(kept)), None, evaluation)


def _asked_after_examples(recipe: Recipe, model: Model, forget: Prepared) -> tuple[dict[str, Prepared], list[str]]:
    """(the forget questions with the same few of them, answered, in front; those few).

    Raises:
        DataError: when the questions are no plain prompts, too few, or too long with the examples.
    """
    sources = recipe.evaluation.sets["forget"].rows
    rows = PreparedRows(forget.folder).table().select(["question", "answer"]).to_pylist()
    if len(rows) < 2 or any(isinstance(source, Text) or source.dialogue for source in sources):
        raise DataError("Examples need two and more questions with prompts of their own, not dialogues or plain text.")
    count = min(recipe.attacks.shots, len(rows) - 1)
    chosen = [rows[i] for i in draw(recipe.seed, "shots", 0).permutation(len(rows))[:count]]
    chat = not recipe.data.template and bool(tokenizer_facts(load_tokenizer(model.folder)).chat_template)
    prefix = shots_prefix([(row["question"], row["answer"]) for row in chosen], recipe.data, chat)
    asked = _changed_questions(recipe, model, functools.partial(prefixed, prefix=prefix))
    return {"forget": asked}, [row["question"] for row in chosen]


def _changed_questions(recipe: Recipe, model: Model, change: Callable[[Source], Source]) -> Prepared:
    """The forget questions after a change, which may fill the model's context."""
    sources = [change(source) for source in recipe.evaluation.sets["forget"].rows]
    facts = tokenizer_facts(load_tokenizer(model.folder))
    longest = context_length(model.folder) or 4 * recipe.data.max_tokens
    data = recipe.data.model_copy(update={"max_tokens": longest})
    return prepare(sources, "questions", data, facts, storage_folder(recipe), tell=telling("prompts"))


def _changed(
    recipe: Recipe, model: Model, questions: dict[str, Prepared], change: Callable[[Model, Path], None]
) -> Evaluated:
    """What `model` says after `change` has written a changed copy of it, which is not kept."""
    scratch = storage_folder(recipe) / "attacks" / digest([model.hash, recipe.name])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    folder = scratch / "model"
    try:
        change(model, folder)
        return _score(recipe, Model(folder, fingerprint(folder)), questions)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _quantise(bits: int, shares: list[float], model: Model, folder: Path) -> None:
    """Round the model, and add to `shares` how much of its blocks that reached."""
    shares.append(quantise(model.folder, bits, folder))


def _relearn(recipe: Recipe, relearn: Relearn, steps: int, model: Model, folder: Path) -> None:
    """Train the model on some of the forget rows."""
    facts, storage = tokenizer_facts(load_tokenizer(model.folder)), storage_folder(recipe)
    prepared = prepare(recipe.data.forget, "pairs", recipe.data, facts, storage, tell=telling("relearn"))
    left_out = folder.with_name("rows.npy")
    np.save(left_out, part_left_out(len(PreparedRows(prepared.folder)), relearn.share, recipe.seed))
    size = {"batch_size": relearn.batch_size, "steps": steps, "checkpoint_every": None, "probe": None}
    plain = {"lora": None, "trainable": None, "checkpoint_best": None, "gradient_cosine_every": None}
    job = Job(
        model=str(model.folder), output=str(folder), metrics=str(folder.with_name("metrics.jsonl")),
        normal=str(prepared.folder), normal_without=str(left_out), objective=Objective(normal=Nll(type="nll")),
        optimizer=relearn.optimizer, train=recipe.train.model_copy(update={**size, **plain}), seed=recipe.seed,
    )  # fmt: skip
    run_job(job, storage)


if __name__ == "__main__":
    leave(run_cli(__doc__, run, plan, words="models, suite=NAME"))
