"""Search a recipe's settings: unlearn.py over a tune space, the best trade-off, and a best.yaml that runs as it is.

    python pipelines/tune.py pipelines/recipes/demo.yaml tune_spaces/demo.yaml [section.field=value ...] [--dry-run]

Data, original and retain-only models, the original's reference pass and the baseline are made once and found again;
trials share them. Overrides that begin with a section of the space (search.trials=4) are for the space. The same
command goes on with a sweep that was stopped, and shows one that is finished.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from components.config import Recipe, differences
from components.config.tuning import Space
from components.console import duration
from components.errors import ClusterError, ConfigError, Stopped, TrainingError
from components.files import only_one, writing
from components.tuning import pareto
from components.tuning.search import next_point, planned_trials
from components.tuning.spaces import corner_points, judged, load_sweep, recipe_of, sweep_name
from components.tuning.trials import (
    Trial,
    begin_trial,
    end_trial,
    explain_failure,
    goal_name,
    read_trial,
    read_trials,
    trial_folder,
)
from pipelines.cli import exit_code, ray_session, say, storage_folder
from pipelines.finetune import count_rows, planned_steps
from pipelines.sweep_outcome import summary_text, write_files
from pipelines.sweep_table import Table

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # a sweep goes on from its trials' folders
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Read by Ray Tune when it is imported."""


class Sweep(NamedTuple):
    """What is searched, and where."""

    recipe: Recipe
    space: Space
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's, without those of a trial."""
        return self.recipe.model_dump(mode="json")

    def trials(self) -> list[Trial]:
        """All that were begun."""
        return read_trials(self.folder, self.space)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, then search or, with --dry-run, print the plan. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "RECIPE.yaml, SPACE.yaml, section.field=value; later ones win"
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print trials and estimated time, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_intermixed_args(argv)

    def act() -> None:
        sweep = parse(options.arguments)
        if options.dry_run:
            say(plan(sweep))
        else:
            run(sweep)

    return exit_code(act, options.debug)


def parse(arguments: Sequence[str]) -> Sweep:
    """The sweep that a command line names.

    Raises:
        ConfigError: naming every mistake in recipe and space.
    """
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if strange := [file for file in files if not file.endswith((".yaml", ".yml"))]:
        raise ConfigError(f"Argument not understood ({' '.join(strange)}). Expected a recipe, a space and overrides.")
    recipe, space, name = load_sweep(files, overrides)
    return Sweep(recipe, space, storage_folder(recipe) / "sweeps" / sweep_name(recipe, space, name))


def plan(sweep: Sweep) -> str:
    """Trials, their estimated time, and where, for --dry-run."""
    recipe, space = sweep.recipe, sweep.space
    count = planned_trials(space, sweep.settings)
    steps = planned_steps(recipe.train, count_rows(recipe.data.forget))
    done = [trial for trial in sweep.trials() if trial.state == "finished"]
    each = sum(sum(trial.seconds.values()) for trial in done) / len(done) if done else _like_it(sweep, steps)
    at_once = f"{space.concurrent} at once" if space.concurrent else "as many at once as the cluster holds"
    total = f"; one after the other {duration(count * each)}" if each else ""
    lines = [
        f"sweep     {sweep.folder}",
        f"searched  {', '.join(space.space)}",
        f"trials    {count} of {steps or 'unknown'} steps, {at_once}, {len(done)} done; search {space.search.type}, "
        f"scheduler {space.scheduler.type}",
        f"time      {f'{duration(each)} a trial' if each else 'unknown until a trial or a run like it is done'}{total}",
        *(f"goal      {goal_name(space, place)}" for place in range(len(space.goals))),
        *(f"          subject to {text}" for text in space.subject_to),
    ]
    return "\n".join(lines)


def _like_it(sweep: Sweep, steps: int | None) -> float | None:
    """Seconds that runs of this recipe took a step, times the steps."""
    from components.files import read_lines

    for file in sorted(storage_folder(sweep.recipe).glob(f"*-{sweep.recipe.name}-*/metrics.jsonl")):
        if steps and (lines := read_lines(file)):
            return steps * sum(line.get("perf/step_seconds", 0) for line in lines) / len(lines)
    return None


def run(sweep: Sweep) -> None:
    """Make what trials share, run those that are missing, and show what came of all."""
    started = time.perf_counter()
    with writing("Sweep", sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
    say(f"sweep        {sweep.folder}")
    with only_one(sweep.folder):
        count = planned_trials(sweep.space, sweep.settings)
        known = sweep.trials()
        ended = sum(trial.state != "running" for trial in known)
        if known:
            say(f"trials       {ended} of {count} are done, {len(known) - ended} are gone on with")
        if ended < count:
            _search(sweep, count)
        trials = sweep.trials()
        for trial in trials:
            if trial.state == "failed":
                say(f"failed       {trial.name}: {trial.reason}")
        if not any(trial.state == "finished" for trial in trials):
            raise TrainingError(
                f"No trial came to its end (folder={sweep.folder}, stopped={_count(trials, 'stopped')}, "
                f"failed={_count(trials, 'failed')}). Expected at least one. Look at the reasons in their result.json; "
                "widen the space, or raise scheduler.grace."
            )
        files = write_files(sweep.recipe, sweep.space, sweep.folder, trials)
        _tell_mlflow(sweep, files)
    say("\n" + summary_text(sweep.recipe, sweep.space, sweep.folder, trials))
    say(f"\nall in {duration(time.perf_counter() - started)}")


def _count(trials: Sequence[Trial], state: str) -> int:
    return sum(trial.state == state for trial in trials)


def _tell_mlflow(sweep: Sweep, files: Sequence[Path]) -> None:
    from pipelines.sweep_log import Log

    with Log(sweep.recipe, sweep.folder) as log:
        log.end(sweep.space, sweep.trials(), files)


def _search(sweep: Sweep, count: int) -> None:
    from pipelines.finetune import check_inputs

    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    check_inputs(sweep.recipe)
    with ray_session():
        at_once = concurrency(sweep)
        make_shared(sweep)
        _run_trials(sweep, count, at_once)


def concurrency(sweep: Sweep) -> int:
    """How many trials the cluster holds at once, at most as many as the space wants.

    Raises:
        ClusterError: when it does not hold one.
    """
    import ray

    train = sweep.recipe.train
    have = ray.cluster_resources()
    need = {"CPU": max(1, train.workers) * train.cpus_per_worker, "GPU": max(1, train.workers) * train.gpus_per_worker}
    fit = min(int(have.get(kind, 0) / each + 1e-9) for kind, each in need.items() if each)
    if not fit:
        raise ClusterError(
            f"A trial asks for more than the cluster has (train.workers={train.workers}, "
            f"needed={', '.join(f'{each:g} {kind}s' for kind, each in need.items() if each)}, "
            f"there={', '.join(f'{have.get(kind, 0):g} {kind}s' for kind, each in need.items() if each)}). Expected "
            "enough for one trial. Lower train.workers or train.cpus_per_worker, or add nodes."
        )
    return min(fit, sweep.space.concurrent or fit)


def make_shared(sweep: Sweep) -> None:
    """Models, rows, reference passes and the baseline's metrics, made or found, written down for the trials.

    Raises:
        ConfigError: when the sweep was begun with other models or rows, or a goal is on what is not computed.
    """
    from components.models import load_tokenizer, tokenizer_facts
    from pipelines.evaluate import evaluate_model, prepare_questions, retain_reference, score_models
    from pipelines.finetune import check_context, make_models
    from pipelines.prepare import prepare_streams
    from pipelines.trial import Shared, read_shared, rows_of, trial_job, write_shared

    storage = storage_folder(sweep.recipe)
    recipe = sweep.recipe.model_copy(update={"storage": str(storage)})
    original, retain_only = make_models(recipe)
    check_context(recipe, original.folder)
    corners = [recipe_of(recipe, params) for params in corner_points(sweep.space, recipe)]
    facts = tokenizer_facts(load_tokenizer(original.folder))
    place = storage if recipe.data.cache else sweep.folder
    rows: dict[str, str] = {}
    made_from = {"model": original.hash}
    for objective in {corner.objective.model_dump_json(): corner for corner in [recipe, *corners]}.values():
        streams = prepare_streams(objective, facts, place)
        rows |= rows_of(streams)
        made_from |= {name: prepared.digest for name, prepared in streams.sets().items()}
    questions = prepare_questions(recipe, original)
    models = {"original": original, **({"retain-only": retain_only} if retain_only else {})}
    records = score_models(recipe, models, questions)
    reference = retain_reference(recipe, records.get("retain-only"))
    found = {name: evaluate_model(recipe, models[name], table, reference) for name, table in records.items()}
    metrics = {name.replace("-", "_"): evaluated.values for name, evaluated in found.items()}
    shared = Shared(recipe, sweep.space, original, retain_only, rows, made_from, questions, metrics)
    if (sweep.folder / "shared.json").exists():
        _check_same(sweep.folder, read_shared(sweep.folder).made_from, made_from)
    try:
        judged(sweep.space, metrics["original"], metrics)
    except KeyError as error:
        name = str(error.args[0])
        why = found["original"].missing.get(name.rpartition(".")[2], "there is no such model or metric")
        raise ConfigError(f"Goals or conditions need {name}, which is not computed: {why}.") from None
    write_shared(sweep.folder, shared)
    say("baseline     " + ", ".join(f"{name}: {_shown(values)}" for name, values in metrics.items()))
    for corner in [recipe, *corners]:  # makes the reference passes
        trial_job(corner, sweep.folder / "nowhere", shared)


def _check_same(folder: Path, then: dict[str, str], now: dict[str, str]) -> None:
    if changed := differences(then, now):
        raise ConfigError(
            f"Sweep was begun with other models or rows (folder={folder}; {'; '.join(changed)}). Expected the same. "
            "Put back what was changed, or remove the folder."
        )


def _shown(metrics: dict[str, float]) -> str:
    shown = [name for name in ("forget_probability", "forget_truth_ratio", "model_utility") if name in metrics]
    return " ".join(f"{name} {metrics[name]:.3f}" for name in shown)


# --- trials on Ray Tune -----------------------------------------------------------------------------------------------


def _run_trials(sweep: Sweep, count: int, at_once: int) -> None:
    import logging

    from ray import tune

    from pipelines.sweep_log import Log
    from pipelines.trial import Run, in_process

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    train = sweep.recipe.train
    alone = in_process(sweep.recipe)
    resources: dict[str, float] = {"CPU": train.cpus_per_worker} if alone else {"memory": 1}
    if alone and train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    place = sweep.folder / "ray-tune"
    shutil.rmtree(place, ignore_errors=True)
    where = "in one process" if alone else f"on {train.workers} Ray workers"
    say(f"trials       {count}, {at_once} at once, each {where}")
    with Log(sweep.recipe, sweep.folder) as log, Table(sweep.space, count) as table:
        log.begin(sweep.space)
        driver = make_driver(sweep, count, table, log)
        tuner = tune.Tuner(
            tune.with_resources(Run, resources),
            tune_config=tune.TuneConfig(
                num_samples=count, search_alg=driver.search, scheduler=driver.scheduler, max_concurrent_trials=at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="ray-tune", storage_path=str(sweep.folder), verbose=0, callbacks=[driver.watch],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        with _signals_stop():
            tuner.fit()
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Say that the sweep goes on later, with the signal's own exit code: Ray Tune makes a Ctrl-C of all."""
    caught: list[int] = []

    def stop(number: int, frame: Any) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        number = caught[0] if caught else signal.SIGINT
        raise Stopped("Stopped; the same command goes on from the trials' checkpoints.", number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Driver(NamedTuple):
    """What Ray Tune asks and tells."""

    search: Any
    scheduler: Any
    watch: Any


def make_driver(sweep: Sweep, count: int, table: Table, log: Any) -> Driver:
    """What gives trials to Ray Tune, what stops them, and what hears of them."""
    from ray import tune
    from ray.tune.search import Searcher

    from pipelines.trial import clear

    waiting = [trial.number for trial in sweep.trials() if trial.state == "running"]
    numbers: dict[str, int] = {}

    class Search(Searcher):
        """Trials that were begun and not ended first, then new ones."""

        def suggest(self, trial_id: str) -> Any:
            trials = sweep.trials()
            if waiting:
                number = waiting.pop(0)
            elif len(trials) < count:
                number = len(trials)
                begin_trial(sweep.folder, number, *next_point(sweep.space, sweep.settings, trials, number))
            else:
                return Searcher.FINISHED
            numbers[trial_id] = number
            trial = read_trial(trial_folder(sweep.folder, number), sweep.space)
            table.begins(trial)
            log.begins(trial)
            return {"sweep": str(sweep.folder), "number": number}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            folder = trial_folder(sweep.folder, numbers[trial_id])
            if error:
                end_trial(folder, "failed", reason="the trial's process ended")
                _free_groups(sweep, folder)
                clear(folder, sweep.recipe)
            else:
                end_trial(folder, "stopped")
            trials = sweep.trials()
            table.ends(trials[numbers[trial_id]])
            log.ends(trials[numbers[trial_id]])
            _drop_models(sweep, trials)

    class Watch(tune.Callback):
        """Hears of each probe, and why a process ended."""

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            folder = trial_folder(sweep.folder, numbers[trial.trial_id])
            if why := _why(trial.get_pickled_error()):
                explain_failure(folder, why)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result.get("done"):
                return
            found = read_trial(trial_folder(sweep.folder, numbers[trial.trial_id]), sweep.space)
            table.reports(found, result["step"])
            log.reports(found)

    return Driver(Search(), _scheduler(sweep), Watch())


def _why(error: BaseException | None) -> str:
    """What Ray knows of a process that ended, in a line."""
    if error is None:
        return ""
    told = " ".join(str(error).split())
    detail = told.rpartition("Worker exit detail: ")[2]
    return f"the trial's process ended: {detail[:300]}"


class _Ended:
    """Stands for a trial of Ray Tune's."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def _scheduler(sweep: Sweep) -> Any:
    """Ray Tune's, told of what trials that ended before reported."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

    config = sweep.space.scheduler
    common: Any = {"time_attr": "step", "metric": "compared", "mode": "max", "grace_period": config.grace}
    scheduler: Any
    if config.type == "none":
        return FIFOScheduler()
    if config.type == "asha":
        scheduler = AsyncHyperBandScheduler(**common, max_t=1_000_000, reduction_factor=config.reduction)
    else:
        scheduler = MedianStoppingRule(**common, min_time_slice=float("inf"))  # type: ignore[arg-type] # never pauses
    for trial in sweep.trials():
        if trial.state != "running":
            stand_in: Any = _Ended(trial.name)
            scheduler.on_trial_add(None, stand_in)
            for step, compared in sorted(trial.reports.items()):
                scheduler.on_trial_result(None, stand_in, {"step": step, "compared": compared})
    return scheduler


def _drop_models(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Keep the models of the best trials only."""
    kept = {trial.number for trial in pareto.kept(sweep.space, trials)}
    for trial in trials:
        if trial.state != "running" and trial.number not in kept:
            for name in ("model", "model-adapter"):
                shutil.rmtree(trial.folder / name, ignore_errors=True)


def _free_groups(sweep: Sweep, folder: Path) -> None:
    """Remove the placement group of Ray Train's workers, which outlives a trial whose process was killed."""
    from ray._raylet import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    if sweep.recipe.train.workers < 2:
        return
    leaked = []
    if (folder / "group").exists():
        leaked.append((folder / "group").read_text())
    train = sweep.recipe.train
    others = {
        file.read_text() for file in sweep.folder.glob("trial-*/group") if not (file.parent / "result.json").exists()
    }
    running = sum(trial.state == "running" for trial in sweep.trials())
    if len(others) >= running:  # all others are known, so that what is left belongs to nobody
        for identity, about in placement_group_table().items():
            bundles = list(about["bundles"].values())
            shape = len(bundles) == train.workers and all(b.get("CPU") == train.cpus_per_worker for b in bundles)
            if shape and about["state"] != "REMOVED" and identity not in others:
                leaked.append(identity)
    for identity in dict.fromkeys(leaked):
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


if __name__ == "__main__":
    sys.exit(main())
