"""What is known of a sweep's trials: a folder each, with `trial.json` at its begin and `result.json` at its end."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from components.config import Recipe
from components.config.tuning import Space
from components.files import read_lines, write_whole
from components.tuning import expressions

State = Literal["running", "finished", "stopped", "failed"]


class Trial(NamedTuple):
    """One trial, as its folder tells."""

    number: int
    folder: Path
    params: dict[str, Any]
    """Searched settings by dotted path."""
    sampler: dict[str, Any]
    """What Optuna's sampler noted when it chose them."""
    state: State
    values: list[float]
    """Of the goals; empty unless finished."""
    excess: list[float]
    """By how much each condition is missed; empty unless finished."""
    metrics: dict[str, float]
    reports: dict[int, float]
    """What the scheduler compared, by step."""
    reason: str
    """Why it failed."""
    steps: int
    seconds: dict[str, float]
    """Of `train`, probes included, and `evaluate`."""

    @property
    def feasible(self) -> bool:
        """Finished, and all conditions hold."""
        return self.state == "finished" and all(missed <= 0 for missed in self.excess)

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.name


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


def trial_folder(sweep: Path, number: int) -> Path:
    """Where a trial lives."""
    return sweep / f"trial-{number:03d}"


def begin_trial(sweep: Path, number: int, params: dict[str, Any], sampler: dict[str, Any]) -> Path:
    """Write down what a trial tries."""
    folder = trial_folder(sweep, number)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "trial.json", json.dumps({"number": number, "params": params, "sampler": sampler}, indent=2))
    return folder


def end_trial(folder: Path, state: State, **about: Any) -> bool:
    """Write down how a trial ended, where that is not written yet. Returns whether it was not."""
    if (folder / "result.json").exists():
        return False
    write_whole(folder / "result.json", json.dumps({"state": state, **about}, indent=2))
    return True


def explain_failure(folder: Path, reason: str) -> None:
    """Put a better reason in place of that of a trial whose process ended."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["state"] == "failed":
        write_whole(folder / "result.json", json.dumps({**result, "reason": reason}, indent=2))


def read_trials(sweep: Path, space: Space) -> list[Trial]:
    """All trials that were begun, by number."""
    found = (read_trial(file.parent, space) for file in sweep.glob("trial-*/trial.json"))
    return sorted(found, key=lambda trial: trial.number)


def read_trial(folder: Path, space: Space) -> Trial:
    """One trial that was begun."""
    begun = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    file = folder / "result.json"
    ended: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"state": "running"}
    lines = read_lines(folder / "metrics.jsonl")
    return Trial(
        number=begun["number"], folder=folder, params=begun["params"], sampler=begun["sampler"],
        state=ended["state"], values=ended.get("values", []), excess=ended.get("excess", []),
        metrics=ended.get("metrics", {}), reports=reports(space, lines), reason=ended.get("reason", ""),
        steps=max((line["step"] for line in lines), default=0),
        seconds={"train": sum(line.get("perf/step_seconds", 0) for line in lines), **ended.get("seconds", {})},
    )  # fmt: skip


def reports(space: Space, lines: Sequence[dict[str, Any]]) -> dict[int, float]:
    """What the scheduler compares, by step, out of lines of metrics.jsonl: not of the last, where all is paid for."""
    found = {}
    for line in lines:
        if line["step"] < line["steps"] and any(key.startswith("probe/") for key in line):
            known = {key.replace("/", "."): number for key, number in line.items()}
            try:
                found[line["step"]] = expressions.value(space.scheduler.maximise, known)
            except (KeyError, ArithmeticError, ValueError):
                continue
    return found


def trials_csv(trials: Sequence[Trial], space: Space) -> str:
    """A line a trial: state, settings, goals, conditions, all metrics, seconds."""
    params = list(space.space)
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    goals = [goal_name(space, place) for place in range(len(space.goals))]
    conditions = [f"excess: {text}" for text in space.subject_to]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["trial", "state", "feasible", *params, *goals, *conditions, "steps", "train_seconds", "evaluate_seconds",
         *metrics, "reason"]
    )  # fmt: skip
    for trial in trials:
        settings = [trial.params.get(path, "") for path in params]
        row: list[Any] = [trial.number, trial.state, int(trial.feasible)]
        row += [json.dumps(value) if isinstance(value, dict | list) else value for value in settings]
        row += trial.values or [""] * len(goals)
        row += trial.excess or [""] * len(conditions)
        row += [trial.steps, trial.seconds.get("train", ""), trial.seconds.get("evaluate", "")]
        writer.writerow([*row, *(trial.metrics.get(name, "") for name in metrics), trial.reason])
    return out.getvalue()


def goal_name(space: Space, place: int) -> str:
    """`minimise abs(…)`."""
    goal = space.goals[place]
    return f"{'minimise' if goal.sign > 0 else 'maximise'} {goal.expression}"
