"""A sweep's plots: what was traded off, which settings decide, and which of their values are good."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.config.tuning import Space
from components.evaluation.plots import empty_axes
from components.tuning import pareto
from components.tuning.trials import Trial

_SIZE = (5.4, 4.0)  # inches


def trade_off(space: Space, trials: Sequence[Trial], models: Mapping[str, Mapping[str, float]]) -> Any | None:
    """Probability of the forget answers against model utility, with the models to compare with as landmarks."""
    x, y = "forget_probability", "model_utility"
    shown = [trial for trial in trials if {x, y} <= {*trial.metrics}]
    if not shown:
        return None
    axes = empty_axes("probability of forget answers (lower is better)", "model utility (higher is better)", _SIZE)
    front = {trial.number for trial in pareto.pareto_set(space, trials)}
    best = pareto.best(space, trials)
    groups = {
        "trial": [t for t in shown if t.number not in front and t.feasible],
        "conditions missed": [t for t in shown if t.number not in front and not t.feasible],
        "Pareto set": [t for t in shown if t.number in front],
    }
    for (name, members), (color, marker) in zip(groups.items(), _MARKS, strict=True):
        if members:
            points = [(t.metrics[x], t.metrics[y]) for t in members]
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=40, label=name)
    for trial in shown:
        axes.annotate(f" {trial.number}", (trial.metrics[x], trial.metrics[y]), fontsize=7)
    if best is not None and best in shown:
        axes.scatter(
            best.metrics[x], best.metrics[y], s=160, facecolors="none", edgecolors="black", label=f"best: {best.number}"
        )
    for (name, metrics), marker in zip(models.items(), ("s", "D", "^"), strict=False):
        if {x, y} <= {*metrics}:
            axes.scatter(metrics[x], metrics[y], color="grey", marker=marker, s=60, label=name.replace("_", "-"))
    return _with_legend(axes)


_MARKS = (("tab:blue", "o"), ("tab:red", "x"), ("tab:green", "o"))


def importance(found: Mapping[str, float], names: Mapping[str, str]) -> Any | None:
    """Bars of each setting's share in what decides the goal."""
    if not found:
        return None
    axes = empty_axes("share in what decides the goal (PED-ANOVA)", "", _SIZE)
    paths = list(found)[::-1]
    axes.barh([names.get(path, path) for path in paths], [found[path] for path in paths])
    return axes.figure


def parallel(space: Space, trials: Sequence[Trial], names: Mapping[str, str]) -> Any | None:
    """A line a finished trial through the values of its settings to the first goal.

    The better, the darker; broken where conditions are missed.
    """
    finished = pareto.in_order(space, trials)[::-1]  # the best is drawn last
    if len(finished) < 2:
        return None
    columns = {names.get(path, path): _positions(space, path, finished) for path in space.space}
    columns["goal" if len(space.goals) == 1 else "goal 1"] = _scaled([trial.values[0] for trial in finished])
    axes = empty_axes("", "", _SIZE)
    axes.figure.set_size_inches(max(5.4, 1.3 * len(columns)), 4.0)
    for place, trial in enumerate(finished):
        heights = [column[0][place] for column in columns.values()]
        shade = (place + 1) / len(finished)
        color, style = (0.1, 0.3, 0.7, 0.15 + 0.85 * shade), "-" if trial.feasible else ":"
        axes.plot(range(len(columns)), heights, color=color, linewidth=0.8 + shade, linestyle=style)
    for place, (_, ticks) in enumerate(columns.values()):
        for height, text in ticks:
            axes.annotate(text, (place, height), fontsize=7, xytext=(3, 0), textcoords="offset points")
        axes.axvline(place, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8, rotation=15)
    axes.set_yticks([])
    axes.grid(visible=False)
    return axes.figure


Column = tuple[list[float], list[tuple[float, str]]]
"""Heights from 0 to 1, NaN where the setting was not searched; and what is written where."""


def _positions(space: Space, path: str, trials: Sequence[Trial]) -> Column:
    searched = space.space[path]
    values = [trial.params.get(path) for trial in trials]
    if searched.kind in ("choice", "grid"):
        step = 1 / max(1, len(searched.values) - 1)
        ticks = [(i * step, _short(value)) for i, value in enumerate(searched.values)]
        return [searched.values.index(v) * step if v in searched.values else np.nan for v in values], ticks
    low, high = searched.values[:2]
    turned = np.log10 if searched.kind.startswith("log") else float
    first, span = turned(low), turned(high) - turned(low)
    heights = [np.nan if value is None else float((turned(value) - first) / span) for value in values]
    return heights, [(0.0, f"{low:g}"), (1.0, f"{high:g}")]


def _scaled(values: Sequence[float]) -> Column:
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1.0) for value in values], [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]


def _short(value: Any) -> str:
    return str(value.get("type", "…") if isinstance(value, dict) else value)[:16]


def _with_legend(axes: Any) -> Any:
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return axes.figure
