"""A sweep in MLflow: one run for it and one below it for each trial; what a server does not take waits on disk."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from components.config import Recipe, leaves
from components.config.tuning import Space
from components.files import read_lines
from components.process import in_background
from components.tracking.run import LONGEST, last_step, open_spool, put_lines, put_metrics, put_run, settings_of
from components.tracking.spool import Spool
from components.tuning import pareto
from components.tuning.spaces import recipe_of
from components.tuning.trials import Trial, goal_name
from pipelines.cli import storage_folder, tracking_uri
from pipelines.training import telling

_PATIENCE, _LIMIT = 10.0, 60.0  # seconds
_PAUSE = 2.0  # seconds between two rounds of sending
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Log:
    """Puts down what happens, and sends it in a thread."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder, self.storage = recipe, folder, storage_folder(recipe)
        self.parent = self._open(folder)
        self.spools: dict[int, Spool] = {}
        self.sending = ExitStack()

    def __reduce__(self) -> Any:  # Ray Tune writes down whom it tells
        return (Log, (self.recipe, self.folder))

    def __enter__(self) -> "Log":
        self.sending.enter_context(in_background(self._send, "mlflow"))
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            status = "KILLED" if isinstance(error[1], KeyboardInterrupt) else "FAILED"
            for spool in [self.parent, *self.spools.values()]:
                if _status_of(spool) == "RUNNING":
                    spool.put("end", status=status)
        self.sending.close()
        deadline = time.monotonic() + _LIMIT
        for spool in [self.parent, *self.spools.values()]:
            if spool.drain(_PATIENCE, limit=max(0.0, deadline - time.monotonic())):
                break  # the server is away: the same command sends the rest

    def _open(self, folder: Path) -> Spool:
        return open_spool(folder, tracking_uri(self.recipe), telling("MLflow"))

    def _send(self, done: threading.Event) -> None:
        while True:
            for spool in [self.parent, *list(self.spools.values())]:
                if not spool.send(done.is_set):
                    break
            if done.wait(_PAUSE):
                return

    def begin(self, space: Space) -> None:
        """The sweep's own run."""
        settings = {f"space.{path}": f"{about.kind} {about.values}"[:LONGEST] for path, about in space.space.items()}
        settings |= {f"goal_{i + 1}": goal_name(space, i)[:LONGEST] for i in range(len(space.goals))}
        settings |= leaves(space.search.model_dump(), "search.") | leaves(space.scheduler.model_dump(), "scheduler.")
        self._run(self.parent, self.folder, settings, {"recipe": self.recipe.name, "kind": "sweep"})

    def _parent_id(self) -> str | None:
        """What trials name; waited for only until it is known that the server does not answer."""
        deadline = time.monotonic() + _PATIENCE
        while "run_id" not in self.parent.known and not self.parent.error and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.parent.known.get("run_id")

    def begins(self, trial: Trial) -> None:
        """A trial's run, below the sweep's."""
        spool = self.spool(trial)
        tags = {"kind": "trial", "sweep": self.folder.name, "recipe": self.recipe.name}
        if parent := self._parent_id():
            tags["mlflow.parentRunId"] = parent
        self._run(spool, trial.folder, settings_of(recipe_of(self.recipe, trial.params)), tags)

    def reports(self, trial: Trial) -> None:
        """The steps since the last report, as one entry."""
        spool = self.spool(trial)
        reached = last_step(spool)
        if lines := [line for line in read_lines(trial.folder / "metrics.jsonl") if line["step"] > reached]:
            put_lines(spool, lines)

    def ends(self, trial: Trial) -> None:
        """Metrics, state and what the trial is worth."""
        self.reports(trial)
        spool = self.spool(trial)
        goals = {f"goal_{i + 1}": value for i, value in enumerate(trial.values)}
        put_metrics(spool, "eval", trial.metrics, step=trial.steps)
        put_metrics(spool, "sweep", goals, step=trial.steps)
        tags = {
            "state": trial.state,
            "feasible": str(trial.feasible),
            **({"reason": trial.reason} if trial.reason else {}),
        }
        spool.put("tags", tags=tags)
        spool.put("end", status=_STATUS[trial.state])

    def end(self, space: Space, trials: Sequence[Trial], files: Sequence[Path]) -> None:
        """What came of all: the best trial, files, and the parent's id where a trial was put down without it."""
        best = pareto.best(space, trials)
        for trial in trials:  # what waits is sent
            status = _STATUS.get(trial.state)
            if status and _status_of(self.spool(trial)) not in (status, None):
                self.ends(trial)  # it ended while its driver did
        if best is not None and all(entry.get("trials") != len(trials) for entry in self.parent.entries()):
            self._conclude(space, trials, best, files)
        self.parent.drain(_PATIENCE)
        parent = self.parent.known.get("run_id")
        for trial in trials:
            spool = self.spool(trial)
            named = any("mlflow.parentRunId" in entry.get("tags", {}) for entry in spool.entries())
            if parent and not named and spool.entries():
                spool.put("tags", tags={"mlflow.parentRunId": parent})

    def _conclude(self, space: Space, trials: Sequence[Trial], best: Trial, files: Sequence[Path]) -> None:
        goals = {f"best_goal_{i + 1}": value for i, value in enumerate(best.values)}
        put_metrics(self.parent, "sweep", {**goals, "best_trial": float(best.number)}, step=len(trials))
        put_metrics(self.parent, "best", best.metrics, step=len(trials))
        front = " ".join(trial.name for trial in pareto.pareto_set(space, trials))
        self.parent.put("tags", tags={"best_trial": best.name, "pareto_set": front[:4000]})
        for file in files:
            self.parent.put("artifact", path=str(file))
        self.parent.put("end", status="FINISHED", trials=len(trials))

    def spool(self, trial: Trial) -> Spool:
        """What is put down of a trial's run."""
        if trial.number not in self.spools:
            self.spools[trial.number] = self._open(trial.folder)
        return self.spools[trial.number]

    def _run(self, spool: Spool, folder: Path, settings: Mapping[str, Any], tags: dict[str, str]) -> None:
        name = folder.name if spool is self.parent else f"{self.folder.name}/{folder.name}"
        put_run(spool, self.recipe.tracking.experiment, self.storage, folder, settings, tags, name=name)


def _status_of(spool: Spool) -> str | None:
    """RUNNING, or with what a run ended, as it was put down last; None where it never began."""
    entries = [entry for entry in spool.entries() if entry["kind"] in ("run", "attempt", "end")]
    return entries[-1].get("status", "RUNNING") if entries else None
