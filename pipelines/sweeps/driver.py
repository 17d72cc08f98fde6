"""The trials of a sweep on Ray Tune: which comes next, which is stopped early, what is left behind by one that died."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from components.cluster import end_of
from components.errors import ClusterError, Stopped
from components.process import REQUEST, is_request
from components.tuning.search import next_point
from components.tuning.spaces import own_point
from components.tuning.trials import (
    Sweep,
    begin_trial,
    end_trial,
    explain_failure,
    read_trial,
    trial_folder,
)
from pipelines.cli import say
from pipelines.sweeps.mlflow_log import Log
from pipelines.sweeps.shared import clear, drop_models, in_process
from pipelines.sweeps.table import Table

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # a sweep goes on from its trials' folders
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Read by Ray Tune when it is imported."""
_PATIENCE = 120.0  # seconds that trials may take for their present step after a signal


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


def run_trials(sweep: Sweep, count: int, at_once: int, log: Log) -> None:
    """Run what is missing of `count` trials, `at_once` at a time.

    Raises:
        Stopped: after Ctrl-C or SIGTERM; what was begun is gone on with later.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)  # the first ones start together
    from ray import tune

    from pipelines.sweeps.trial import Run

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
    with Table(sweep.space) as table:
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
        with _signals_stop(sweep):
            tuner.fit()
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _signals_stop(sweep: Sweep) -> Iterator[None]:
    """Let running trials write checkpoints, and say that the sweep goes on later, with the signal's own exit code.

    Ray Tune makes a Ctrl-C of all signals, and kills its actors at once.
    """
    caught: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if not is_request():
            return
        caught.append(number)
        if len(caught) == 1:
            with suppress(RuntimeError):  # the signal came while something was being printed
                name, again = signal.Signals(number).name, f"another one after {REQUEST:g} s stops at once"
                say(f"{name}: stopping the trials after this step; {again}")
            asked = [trial.folder / "stop" for trial in sweep.trials() if trial.state == "running"]
            for file in asked:
                file.touch()
            deadline = time.monotonic() + _PATIENCE
            while any(file.exists() for file in asked) and time.monotonic() < deadline:
                time.sleep(0.1)
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


def make_driver(sweep: Sweep, count: int, table: Table, log: Log) -> Driver:
    """What gives trials to Ray Tune, what stops them, and what hears of them."""
    from ray import tune
    from ray.tune.search import Searcher

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
            if not error:  # else Watch, which knows why
                log.ends(trials[numbers[trial_id]])
            drop_models(sweep, trials)

    class Watch(tune.Callback):
        """Hears of each probe, and why a process ended."""

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            folder = trial_folder(sweep.folder, numbers[trial.trial_id])
            if error := trial.get_pickled_error():
                explain_failure(folder, f"the trial's process ended: {end_of(error)}")
            log.ends(read_trial(folder, sweep.space))

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result.get("done"):
                return
            found = read_trial(trial_folder(sweep.folder, numbers[trial.trial_id]), sweep.space)
            table.reports(found, result["step"])
            log.reports(found)

    return Driver(Search(), make_scheduler(sweep), Watch())


class _Ended:
    """Stands for a trial of Ray Tune's."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def make_scheduler(sweep: Sweep) -> Any:
    """Ray Tune's, told of what trials that ended before reported; the recipe's own point it never hears of."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

    class Median(MedianStoppingRule):
        """Told of a trial's end, Ray Tune's own takes it for one more report, and fails where it compares nothing."""

        def on_trial_complete(self, *ended: Any) -> None:
            pass

    config = sweep.space.scheduler
    common: Any = {"time_attr": "step", "metric": "compared", "mode": "max", "grace_period": config.grace}
    scheduler: Any
    if config.type == "none":
        return FIFOScheduler()
    if config.type == "asha":
        scheduler = AsyncHyperBandScheduler(**common, max_t=1_000_000, reduction_factor=config.reduction)
    else:
        scheduler = Median(**common, min_time_slice=float("inf"))  # type: ignore[arg-type] # never pauses
    own = own_point(sweep.space, sweep.settings)
    for trial in sweep.trials():
        if trial.state != "running" and trial.params != own:
            stand_in: Any = _Ended(trial.name)
            scheduler.on_trial_add(None, stand_in)
            for step, compared in sorted(trial.reports.items()):
                scheduler.on_trial_result(None, stand_in, {"step": step, "compared": compared})
    return scheduler


def _free_groups(sweep: Sweep, folder: Path) -> None:
    """Remove the placement group of Ray Train's workers, which outlives a trial whose process was killed."""
    from ray._raylet import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    if in_process(sweep.recipe):
        return
    file = folder / "group"
    for identity in [file.read_text(encoding="utf-8")] if file.exists() else _groups_of_nobody(sweep):
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


def _groups_of_nobody(sweep: Sweep) -> list[str]:
    """Those that no running trial has named: of a trial that was killed before its workers were up.

    Known only where all other trials' workers are up, on a Ray that this command has started: elsewhere they may be
    another job's.
    """
    from ray.util import placement_group_table

    running = [trial for trial in sweep.trials() if trial.state == "running"]
    named = {
        (trial.folder / "group").read_text(encoding="utf-8") for trial in running if (trial.folder / "group").exists()
    }
    if "RAY_ADDRESS" in os.environ or len(named) < len(running):
        return []
    train = sweep.recipe.train
    return [
        identity
        for identity, about in placement_group_table().items()
        if about["state"] != "REMOVED"
        and identity not in named
        and [bundle.get("CPU") for bundle in about["bundles"].values()] == [train.cpus_per_worker] * train.workers
    ]
