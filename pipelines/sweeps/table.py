"""What is seen of a sweep while it goes on: a table in place on a terminal, single lines elsewhere."""

import json
import shutil
import sys
import time
from typing import Any

from components.config.tuning import Space
from components.console import duration, number, table
from components.files import read_lines
from components.tuning.spaces import Params
from components.tuning.trials import Trial
from pipelines.cli import say

_WIDEST = 18  # characters of a value
_EVERY = 0.5  # seconds between two drawings


class Table:
    """Trials with their state, settings, step, probes and time."""

    def __init__(self, space: Space):
        self.space = space
        self.names = short_names(list(space.space))
        self.live = sys.stdout.isatty()
        self.began: dict[int, float] = {}
        self.rows: dict[int, list[str]] = {}
        self.drawn, self.drawn_at = 0, 0.0

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(last=True)

    def __reduce__(self) -> Any:  # Ray Tune writes down whom it tells
        return (Table, (self.space,))

    def begins(self, trial: Trial) -> None:
        """A trial is begun, or gone on with."""
        self.began[trial.number] = time.monotonic()
        self._show(trial, f"{trial.name} begins   {settings_text(self.names, trial.params)}")

    def reports(self, trial: Trial, step: int) -> None:
        """A trial has measured something after `step`."""
        self._show(trial, f"{trial.name} step {step:>4} {_probes(trial, step)}  {self._time(trial)}", step)

    def ends(self, trial: Trial) -> None:
        """A trial is finished, stopped or failed."""
        words = {
            "finished": "  ".join(
                f"{'value' if len(trial.values) == 1 else f'goal {i + 1}'} {number(v)}"
                for i, v in enumerate(trial.values)
            )
            + ("" if trial.feasible else "  conditions are missed"),
            "stopped": f"at step {trial.steps}, behind the others",
            "failed": trial.reason,
        }[trial.state]
        self._show(trial, f"{trial.name} {trial.state:<8} {words}  {self._time(trial)}")

    def _time(self, trial: Trial) -> str:
        return duration(time.monotonic() - self.began.get(trial.number, time.monotonic()))

    def _show(self, trial: Trial, line: str, step: int | None = None) -> None:
        probes = _last_probe(trial, step)
        values = "  ".join(number(value) for value in trial.values) or "-"
        measured = [number(probes.get(f"probe/{group}_probability")) for group in ("forget", "normal")]
        params = [setting_text(trial.params.get(path)) for path in self.names]
        at = str(step or trial.steps)
        self.rows[trial.number] = [
            str(trial.number), trial.state, *params, at, *measured, values, self._time(trial),
        ]  # fmt: skip
        if self.live:
            self._draw()
        else:
            say(f"  {line}")

    def _draw(self, last: bool = False) -> None:
        if not self.live or not (last or time.monotonic() - self.drawn_at > _EVERY):
            return
        header = ["trial", "state", *self.names.values(), "step", "forget", "normal", "value", "time"]
        width, height = shutil.get_terminal_size()
        head, line, *rows = table(header, [self.rows[key] for key in sorted(self.rows)]).splitlines()
        lines = [text[: width - 1] for text in (head, line, *rows[-max(1, height - 4) :])]  # no line is to be wrapped
        up = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        sys.stdout.write(up + "\n".join(lines) + "\n")
        sys.stdout.flush()
        self.drawn, self.drawn_at = len(lines), time.monotonic()


def short_names(paths: list[str]) -> dict[str, str]:
    """By path, as few of its last parts as tell it from the others; ε1, ε2 and ε3 for the weights."""
    epsilons = {f"objective.{group}.weight": f"ε{i}" for i, group in enumerate(("forget", "random", "normal"), start=1)}
    names = {}
    for path in paths:
        parts = path.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        alone = (t for t in tails if sum(other == t or other.endswith(f".{t}") for other in paths) == 1)
        names[path] = epsilons.get(path) or next(alone, path)
    return names


def settings_text(names: dict[str, str], params: Params) -> str:
    """`ε1 0.03  ε2 1`."""
    return "  ".join(f"{names[path]} {setting_text(value)}" for path, value in params.items() if path in names)


def setting_text(value: Any) -> str:
    """A searched value, in a few characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    text = value.get("type", json.dumps(value)) if isinstance(value, dict) else str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _last_probe(trial: Trial, step: int | None) -> dict[str, Any]:
    lines = read_lines(trial.folder / "metrics.jsonl")
    probed = [line for line in lines if any("probe/" in key for key in line) and (not step or line["step"] <= step)]
    return probed[-1] if probed else {}


def _probes(trial: Trial, step: int) -> str:
    last = _last_probe(trial, step)
    return "  ".join(
        f"{group} {number(last[key])}"
        for group in ("forget", "normal")
        if (key := f"probe/{group}_probability") in last
    )
