"""Make the models that unlearning starts from and is compared with.

The original knows everything; retain-only never saw the forget set.

    python pipelines/finetune.py pipelines/recipes/demo.yaml [section.field=value ...] [--dry-run]

Both are kept under <storage>/models by the hash of what they were made from, and found again.
"""

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.config import (
    NOT_PART_OF_TRAINING,
    Classifier,
    Custom,
    Files,
    HuggingFace,
    Nll,
    Objective,
    PoolSource,
    Pretrained,
    Recipe,
    Scratch,
    Source,
    Text,
    Train,
    digest,
)
from components.console import duration
from components.data import locations
from components.data.mapping import levelled, row_texts
from components.data.overlap import Overlap, find_overlap
from components.data.prepare import prepare, prepared_digest
from components.data.prompts import DEFAULT_TEMPLATE, TokenizerFacts
from components.data.rows import PreparedRows
from components.data.sources import fingerprint as source_fingerprint
from components.data.sources import hub_commit, read_records, source_files
from components.errors import ConfigError
from components.files import sha256
from components.model_files import Kind, check_files, parameter_count
from components.models import (
    check_model,
    context_length,
    fingerprint,
    layer_count,
    load_tokenizer,
    local_folder,
    make_scratch,
    tokenizer_facts,
)
from components.training.checkpoint_files import Place, remove_all
from components.training.job import Job
from components.training.launch import check_cluster, run_job
from pipelines.cli import Command, leave, ray_session, run_cli, say, storage_folder
from pipelines.training import checkpoint_place, say_stopped, shown, telling

_COUNTED_BYTES = 64 << 20  # a plan must be there at once


class Model(NamedTuple):
    """A model folder and its fingerprint."""

    folder: Path
    hash: str
    """Fingerprint of its files."""


def run(command: Command) -> None:
    """Make what is missing and say where it is."""
    recipe = command.recipe
    check_inputs(recipe)
    with ray_session(storage_folder(recipe)):
        models = make_models(recipe)
    for name, model in models.items():
        say(f"{name:<12} {model.folder}")


def plan(command: Command) -> str:
    """What would be made, for --dry-run."""
    recipe = command.recipe
    check_plan(recipe)
    if not recipe.finetune:
        return "\nPlan: nothing to make, the recipe names its models."
    lines = [f"\nPlan: models under {storage_folder(recipe) / 'models'}"]
    for name, sources in _to_make(recipe).items():
        rows, batch = count_rows(sources), recipe.finetune.train.batch_size
        steps = planned_steps(recipe.finetune.train, rows)
        lines.append(f"  {name}: {rows or 'unknown'} rows, batch {batch}, {steps or 'unknown'} steps")
    return "\n".join(lines)


def make_models(recipe: Recipe) -> dict[str, Model]:
    """`original` and, where something says how, `retain-only`: taken from the recipe's paths, or made."""
    made, to_make = {}, _to_make(recipe)
    for field in ("original", "retain_only"):
        name = field.replace("_", "-")
        if given := getattr(recipe.models, field):
            folder = local_folder(given, storage_folder(recipe))
            made[name] = Model(folder, fingerprint(folder))
        elif field in to_make:
            made[name] = _make(recipe, field, to_make[field])
    return made


def _to_make(recipe: Recipe) -> dict[str, Sequence[Source]]:
    """Training rows of each model that is to be made."""
    if not recipe.finetune:
        return {}
    whole = [_whole(source) for source in (*recipe.data.normal, *recipe.data.forget)]
    everything = [source for i, source in enumerate(whole) if source not in whole[:i]]
    sources = {"original": everything, "retain_only": recipe.data.normal}
    return {name: rows for name, rows in sources.items() if rows and not getattr(recipe.models, name)}


def _whole(source: Source) -> Source:
    """All its records, whatever is requested of them."""
    return source if isinstance(source, Text) else source.model_copy(update={"requested": None, "not_requested": None})


def _make(recipe: Recipe, name: str, sources: Sequence[Source]) -> Model:
    """Fine-tune the base on `sources` by next-token loss on the answers."""
    finetune, storage = recipe.finetune, storage_folder(recipe)
    assert finetune is not None
    base = base_folder(recipe)
    check_context(recipe, base)
    facts = tokenizer_facts(load_tokenizer(base))
    made_from: list[Any] = [
        fingerprint(base),
        prepared_digest(sources, "pairs", recipe.data, facts, storage),
        recipe.seed,
        finetune.optimizer.model_dump(),
        _result_of(finetune.train),
    ]
    drops = name == "retain_only" and recipe.data.overlap == "drop_from_normal"
    if drops:
        made_from.append(prepared_digest(recipe.data.forget, "pairs", recipe.data, facts, storage))
    folder = storage / "models" / f"{name.replace('_', '-')}-{digest(made_from)}"
    metrics, checkpoints, events, stop = (
        folder.with_name(f"{folder.name}.{kind}") for kind in ("jsonl", "checkpoints", "events.jsonl", "stop")
    )
    place_of_checkpoints = checkpoint_place(finetune.train, checkpoints, f"{folder.name}-{digest(str(storage), 8)}")
    if folder.exists():
        say(f"{name:<12} found in {folder}")
        if checkpoints.exists():  # killed between the two
            remove_all(Place(place_of_checkpoints))
        return Model(folder, fingerprint(folder))
    place = storage if recipe.data.cache else folder.with_name(f"{folder.name}.data")
    prepared = prepare(sources, "pairs", recipe.data, facts, place, tell=telling(name))
    overlap = _overlap(recipe, facts, place)  # told before hours of training, whichever model it is
    without = overlap.rows if overlap and drops else None
    rows = len(PreparedRows(prepared.folder, without))
    say(f"{name:<12} fine-tuning {parameter_count(base):,} parameters on {rows} rows")
    metrics.parent.mkdir(parents=True, exist_ok=True)
    job = Job(
        model=str(base),
        output=str(folder),
        metrics=str(metrics),
        events=str(events),
        stop=str(stop),
        checkpoints=place_of_checkpoints,
        made_from={"made_from": digest(made_from)},
        normal=str(prepared.folder),
        normal_without=str(without) if without else None,
        objective=Objective(normal=Nll(type="nll")),
        optimizer=finetune.optimizer,
        train=finetune.train,
        seed=recipe.seed,
    )
    check_cluster_for(recipe)
    started = time.perf_counter()
    with shown(job):
        outcome = run_job(job, storage)
    remove_all(Place(place_of_checkpoints))
    stop.unlink(missing_ok=True)
    say_stopped(outcome)
    if not recipe.data.cache:
        shutil.rmtree(place, ignore_errors=True)
    say(f"  done in {duration(time.perf_counter() - started)}: {folder}")
    return Model(folder, fingerprint(folder))


def _overlap(recipe: Recipe, facts: TokenizerFacts, place: Path) -> Overlap | None:
    data = recipe.data
    if not data.forget or not data.normal or data.overlap == "keep":
        return None
    forget, normal = (
        prepare(s, "pairs", data, facts, place, tell=telling("overlap")) for s in (data.forget, data.normal)
    )
    return find_overlap(forget, normal, data.overlap, place)


def _result_of(train: Train) -> dict[str, Any]:
    """Training settings that decide the result, not how the work is split."""
    return train.model_dump(exclude=NOT_PART_OF_TRAINING)


def base_folder(recipe: Recipe) -> Path:
    """The model to fine-tune; one from scratch gets its tokenizer from the recipe's text that is to be kept."""
    assert recipe.finetune is not None
    base = recipe.finetune.base
    if isinstance(base, Pretrained):
        return local_folder(base, storage_folder(recipe))
    template = recipe.data.template or DEFAULT_TEMPLATE
    return make_scratch(base, [template, *_texts_to_keep(recipe)], recipe.seed, storage_folder(recipe))


def _texts_to_keep(recipe: Recipe) -> Iterator[str]:
    """The texts of the normal rows, without rows that are also forget or holdout rows.

    A tokenizer that was trained on a name keeps it as a token, in every model made from it: in the unlearned model,
    which no training changes there, and in the retain-only model, which must never have met the name.
    """
    questions = [recipe.evaluation.sets[name].rows for name in ("forget", "holdout") if name in recipe.evaluation.sets]
    unseen = {
        tuple(map(levelled, row))
        for source in (*recipe.data.forget, *itertools.chain(*questions))
        for row in row_texts(source)
    }
    for source in recipe.data.normal:
        for row in row_texts(source):
            if tuple(map(levelled, row)) not in unseen:
                yield from row


def check_inputs(recipe: Recipe) -> None:
    """Whatever can be told before Ray starts: files that are missing, models and tokenizers that cannot be used.

    Raises:
        ConfigError, DataError, ModelError: naming the first thing that is wrong.
    """
    check_sources(recipe)
    for model, kind in _models(recipe):
        check_model(local_folder(model, storage_folder(recipe)), kind)
    for model in _given_models(recipe):
        check_context(recipe, local_folder(model, storage_folder(recipe)))
    if recipe.finetune and isinstance(recipe.finetune.base, Scratch):
        _check_length(recipe, recipe.finetune.base.context, "finetune.base")
    _check_objective(recipe)


def check_plan(recipe: Recipe) -> None:
    """What `check_inputs` says of models whose folders are on this machine, as far as their files tell it at once.

    Raises:
        ModelError: naming a folder that cannot be used.
    """
    for model, kind in _models(recipe):
        path = Path(model.path).expanduser()
        if path.is_dir():
            check_files(path, kind)


def _check_objective(recipe: Recipe) -> None:
    """Refuse a term that cannot be had, or a layer that the model has not, before anything is trained."""
    from components.layers import no_such_layer  # these import torch
    from components.objectives.terms import find_term

    for term in recipe.objective.terms().values():
        find_term(term)
    layer, count = recipe.objective.layer, _layers(recipe)
    if layer is not None and count is not None and (problem := no_such_layer(layer, count)):
        raise ConfigError(problem)


def _layers(recipe: Recipe) -> int | None:
    given = recipe.models.original or (recipe.finetune.base if recipe.finetune else None)
    if isinstance(given, Scratch):
        return given.layers
    return layer_count(local_folder(given, storage_folder(recipe))) if given else None


def check_sources(recipe: Recipe) -> None:
    """Refuse a recipe whose files or hub data sets are not there."""
    for source in _sources(recipe):
        source_files(source)
        if source.type == "huggingface" and not Path(source.path).is_dir():
            hub_commit(source.path, source.revision)


def inputs_digest(recipe: Recipe) -> str:
    """Changes with the content of the recipe's files, given models and custom terms."""
    storage = storage_folder(recipe)
    models = [fingerprint(local_folder(model, storage)) for model, _ in _models(recipe)]
    made_from: list[Any] = [[source_fingerprint(source, storage) for source in _sources(recipe)], models]
    for term in recipe.objective.terms().values():
        if isinstance(term, Custom):
            from components.objectives.terms import code_digest  # imports torch

            made_from.append(code_digest(term))
    if recipe.evaluation.retain_log:
        made_from.append(sha256(Path(recipe.evaluation.retain_log).expanduser()))
    return digest(made_from, 32)


def _sources(recipe: Recipe) -> list[PoolSource]:
    evaluated = [source for questions in recipe.evaluation.sets.values() for source in questions.rows]
    return [*recipe.data.forget, *recipe.data.normal, *recipe.data.random, *evaluated]


def _given_models(recipe: Recipe) -> list[Pretrained]:
    base = recipe.finetune.base if recipe.finetune else None
    return [m for m in (recipe.models.original, recipe.models.retain_only, base) if isinstance(m, Pretrained)]


def _models(recipe: Recipe) -> list[tuple[Pretrained, Kind]]:
    """Every model that the recipe names, the evaluation's included, and what it must be."""
    judge, reference = recipe.evaluation.judge, recipe.evaluation.reference
    causal = [*_given_models(recipe), *([reference] if reference else [])]
    found: list[tuple[Pretrained, Kind]] = [(model, "causal") for model in causal]
    if isinstance(judge, Classifier):
        found.append((judge.model, "classifier"))
    return found


def check_context(recipe: Recipe, model: Path) -> None:
    """Refuse rows longer than the model can read."""
    longest = context_length(model)
    if longest is not None:
        _check_length(recipe, longest, model)


def _check_length(recipe: Recipe, longest: int, model: Path | str) -> None:
    if recipe.data.max_tokens > longest:
        raise ConfigError(
            f"Rows may be longer than the model's context (data.max_tokens={recipe.data.max_tokens}, "
            f"context={longest}, model={model}). Expected at most the context. Set data.max_tokens={longest}."
        )


def check_cluster_for(recipe: Recipe) -> None:
    """Refuse more workers than the cluster can hold, before Ray waits for them."""
    for train in (recipe.train, recipe.finetune.train if recipe.finetune else recipe.train):
        if train.workers:
            check_cluster(train.workers, train.cpus_per_worker, train.gpus_per_worker)


def count_rows(sources: Sequence[PoolSource]) -> int | None:
    """Rows of `sources`, bad ones included; None where only preparing, a download or a long reading would tell."""
    for source in sources:
        if isinstance(source, Text | HuggingFace) or any(
            getattr(source, key, None) for key in ("where", "requested", "not_requested")
        ):
            return None
        if isinstance(source, Files):
            if source.split_answers or any(locations.is_remote(file) for file in source_files(source)):
                return None
            if sum(locations.size(file) for file in source_files(source)) > _COUNTED_BYTES:
                return None
    return sum(1 for source in sources for file in source_files(source) for _ in read_records(source, file))


def planned_steps(train: Train, rows: int | None) -> int | None:
    """Optimizer steps over `rows` rows of the pacing set; None where their number is not known yet."""
    return train.steps or (train.epochs * -(-rows // train.batch_size) if rows else None)


def planned_parameters(recipe: Recipe) -> int | None:
    """Parameters of the model to train; None where its folder is not on this machine."""
    from components.models import scratch_parameter_count

    given = recipe.models.original or (recipe.finetune.base if recipe.finetune else None)
    if isinstance(given, Scratch):
        return scratch_parameter_count(given)
    path = Path(given.path).expanduser() if given else None
    return parameter_count(path) if path and path.is_dir() else None


if __name__ == "__main__":
    leave(run_cli(__doc__, run, plan))
