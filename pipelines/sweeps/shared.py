"""What the trials of a sweep share: made once by the driver, found by the trials."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from components.config import Recipe, differences
from components.config.tuning import Space
from components.data.prepare import Prepared
from components.errors import ConfigError
from components.files import write_whole
from components.models import load_tokenizer, tokenizer_facts
from components.training.checkpoint_files import Place, remove_all
from components.training.job import Job
from components.tuning import pareto
from components.tuning.spaces import corner_points, judged, recipe_of
from components.tuning.trials import Sweep, Trial
from pipelines.cli import say, storage_folder
from pipelines.evaluate import check_same_tokens, evaluate_models, headline, prepare_questions, score_models
from pipelines.finetune import Model, check_context, make_models
from pipelines.prepare import prepare_streams
from pipelines.training import checkpoint_place, forget_cache, unlearning_job, with_references

_SHOWN = ("forget_probability", "forget_truth_ratio", "model_utility")


class Shared(NamedTuple):
    """What is made once for all trials of a sweep."""

    recipe: Recipe
    """Without the trials' own settings; its storage is absolute."""
    space: Space
    models: dict[str, Model]
    """Those to compare with, as `make_models` gives them."""
    rows: dict[str, str]
    """Where they lie, as `Streams.places` says."""
    made_from: dict[str, str]
    questions: dict[str, Prepared]
    metrics: dict[str, dict[str, float]]
    """Of those models, as expressions name them: `original`, `retain_only`."""


def write_shared(sweep: Path, shared: Shared) -> None:
    """For the trials, which know the sweep's folder only."""
    plain = {
        "recipe": shared.recipe.model_dump(mode="json"), "space": shared.space.model_dump(mode="json"),
        "models": shared.models, "rows": shared.rows,
        "made_from": shared.made_from, "questions": shared.questions, "metrics": shared.metrics,
    }  # fmt: skip
    write_whole(sweep / "shared.json", json.dumps(plain, indent=2, default=str))


def read_shared(sweep: Path) -> Shared:
    """What `write_shared` wrote."""
    plain = json.loads((sweep / "shared.json").read_text(encoding="utf-8"))
    return Shared(
        recipe=Recipe.model_validate(plain["recipe"]), space=Space.model_validate(plain["space"]),
        models={name: Model(Path(folder), its_hash) for name, (folder, its_hash) in plain["models"].items()},
        rows=plain["rows"], made_from=plain["made_from"],
        questions={name: Prepared(Path(found[0]), *found[1:]) for name, found in plain["questions"].items()},
        metrics=plain["metrics"],
    )  # fmt: skip


def in_process(recipe: Recipe) -> bool:
    """Whether a trial needs no Ray Train of its own."""
    return recipe.train.workers <= 1


def alone(recipe: Recipe) -> Recipe:
    """The recipe for a process that does everything itself."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 0})})


def trial_job(recipe: Recipe, folder: Path, shared: Shared) -> Job:
    """What `recipe` trains in `folder`; the reference pass is found, or made where only this trial needs it."""
    original = shared.models["original"]
    used = (*recipe.objective.groups(), "normal_without")
    rows = {name: place for name, place in shared.rows.items() if name in used}
    job = unlearning_job(recipe, folder, original.folder, rows, shared.made_from, _checkpoints(recipe, folder))
    job = job.model_copy(update={"group": str(folder / "group")})
    return with_references(job, original.hash, storage_folder(recipe) if recipe.data.cache else folder.parent)


def clear(folder: Path, recipe: Recipe) -> None:
    """Remove what only going on with a trial needs."""
    for name in ("stop", "group", "trained.json"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # they only take room
        remove_all(Place(_checkpoints(recipe, folder)))


def drop_models(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Keep the models of the best trials only."""
    kept = {trial.number for trial in pareto.kept(sweep.space, trials)}
    for trial in trials:
        if trial.state != "running" and trial.number not in kept:
            for place in trial.folder.glob("model*"):  # also one that was being written, and an adapter
                shutil.rmtree(place, ignore_errors=True)


def tidy(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Remove what only going on needs, of all trials that ended: while no trial runs."""
    drop_models(sweep, trials)
    for trial in trials:
        if trial.state != "running":
            clear(trial.folder, sweep.recipe)
    if not sweep.recipe.data.cache and all(trial.state != "running" for trial in trials):
        forget_cache(sweep.folder)


def _checkpoints(recipe: Recipe, folder: Path) -> str:
    return checkpoint_place(recipe.train, folder / "checkpoints", f"{folder.parent.name}-{folder.name}")


def make_shared(sweep: Sweep) -> None:
    """Models, rows, reference passes and the baseline's metrics, made or found, written down for the trials.

    Raises:
        ConfigError: when the sweep was begun with other models or rows, or a goal is on what is not computed.
    """
    storage = storage_folder(sweep.recipe)
    recipe = sweep.recipe.model_copy(update={"storage": str(storage)})
    models = make_models(recipe)
    original = models["original"]
    check_context(recipe, original.folder)
    corners = [recipe_of(recipe, params) for params in corner_points(sweep.space, recipe)]
    facts = tokenizer_facts(load_tokenizer(original.folder))
    place = storage if recipe.data.cache else sweep.folder
    rows: dict[str, str] = {}
    made_from = {"model": original.hash}
    for objective in {corner.objective.model_dump_json(): corner for corner in [recipe, *corners]}.values():
        whole = objective.data.model_copy(update={"cache": True})  # trials may take different numbers of steps
        streams = prepare_streams(objective.model_copy(update={"data": whole}), facts, place)
        rows |= streams.places()
        made_from |= {name: prepared.digest for name, prepared in streams.sets().items()}
    questions = prepare_questions(recipe, original)
    check_same_tokens(list(models.values()))
    records = score_models(recipe, models, questions)
    found = evaluate_models(recipe, models, records)
    metrics = {name.replace("-", "_"): evaluated.values for name, evaluated in found.items()}
    shared = Shared(recipe, sweep.space, models, rows, made_from, questions, metrics)
    if (sweep.folder / "shared.json").exists():
        _check_same(sweep.folder, read_shared(sweep.folder), shared)
    try:
        with suppress(ArithmeticError, ValueError):  # of the original itself, such as the logarithm of no change
            judged(sweep.space, metrics["original"], metrics)
    except KeyError as error:
        name = str(error.args[0])
        why = found["original"].missing.get(name.rpartition(".")[2], "there is no such model or metric")
        raise ConfigError(f"Goals or conditions need {name}, which is not computed: {why}.") from None
    write_shared(sweep.folder, shared)
    say("baseline     " + ", ".join(headline(name, values, _SHOWN) for name, values in metrics.items()))
    for corner in [recipe, *corners]:  # makes the reference passes: on GPUs where Ray has them, else here
        here = in_process(corner) and not corner.train.gpus_per_worker
        trial_job(alone(corner) if here else corner, sweep.folder / "nowhere", shared)


def _check_same(folder: Path, then: Shared, now: Shared) -> None:
    if changed := differences(_digests(then), _digests(now)):
        raise ConfigError(
            f"Sweep was begun with other models or rows (folder={folder}; {'; '.join(changed)}). Expected the same. "
            "Put back what was changed, or remove the folder."
        )


def _digests(shared: Shared) -> dict[str, str]:
    return {
        **shared.made_from,
        **{f"{name} model": model.hash for name, model in shared.models.items()},
        **{f"{name} questions": asked.digest for name, asked in shared.questions.items()},
    }
