"""The report's plots, each a figure of its own so that they flow into any width."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.evaluation.membership import auc, min_k
from components.evaluation.metrics import Row, by_set, log_truth_ratios

_SIZE = (4.6, 3.6)  # inches


def plane(models: Mapping[str, Mapping[str, float]]) -> list[Any]:
    """Probability of the forget answers against model utility, a point for each model."""
    axes = empty_axes("probability of forget answers (lower is better)", "model utility (higher is better)")
    for name, metrics in models.items():
        if "forget_probability" in metrics and "model_utility" in metrics:
            axes.scatter(metrics["forget_probability"], metrics["model_utility"], s=60, label=name)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    return _labelled([axes])


def told_apart(records: Mapping[str, pa.Table]) -> list[Any]:
    """Truth ratios of the forget rows with the largest distance to retain-only's, and the ROC of min-k."""
    of = {name: by_set(table) for name, table in records.items()}
    ratios_axes = empty_axes("log truth ratio of forget rows", "share of rows below")
    roc = empty_axes("forget rows taken for unseen", "unseen rows taken for unseen (min-k)")
    for name, sets in of.items():
        if found := log_truth_ratios(sets.get("forget", [])):
            ratios_axes.step(np.sort(found), np.arange(1, len(found) + 1) / len(found), where="post", label=name)
        members, others = (np.array([min_k(row) for row in sets.get(s, [])]) for s in ("forget", "holdout"))
        if len(members) and len(others):
            limits = np.sort(np.concatenate([members, others, [-np.inf]]))[::-1]
            rates = [(np.mean(members > limit), np.mean(others > limit)) for limit in limits]
            roc.plot(*zip(*rates, strict=True), label=f"{name}, AUC {auc(members, others):.2f}")
    _mark_distance(ratios_axes, of)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    return _labelled([ratios_axes, roc])


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What was measured in each step."""
    present = dict.fromkeys(key for line in lines for key in line)  # a step that was left out has few
    panels = {
        "loss": [key for key in present if key.startswith("train/") and key.endswith("_loss")],
        "gradient norm": [key for key in present if key == "train/grad_norm"],
        "clip fraction": [key for key in present if key == "train/clip_fraction"],
        "probe": [key for key in present if key.startswith("probe/")],
    }
    drawn = []
    for title, keys in panels.items():
        axes = empty_axes("step", title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for key in keys:
            having = [line for line in lines if key in line]
            axes.plot([x["step"] for x in having], [x[key] for x in having], label=key.partition("/")[2])
        drawn.append(axes)
    return _labelled([*drawn, _path(lines)])


def _path(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Where the probe went: what is forgotten against what is kept, from the first look to the last."""
    axes = empty_axes("probe of forget rows (lower is better)", "probe of normal rows (higher is better)")
    having = [line for line in lines if {"probe/forget_probability", "probe/normal_probability"} <= {*line}]
    if having:
        x, y = ([line[f"probe/{name}_probability"] for line in having] for name in ("forget", "normal"))
        axes.plot(x, y, marker=".", label="every probed step")
        axes.scatter(x[-1:], y[-1:], s=60, zorder=3, label=f"step {having[-1]['step']}")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
    return axes


def _mark_distance(axes: Any, of: Mapping[str, Mapping[str, list[Row]]]) -> None:
    """The Kolmogorov-Smirnov distance between unlearned and retain-only, where it is largest."""
    from scipy.stats import ks_2samp

    both = [log_truth_ratios(of.get(name, {}).get("forget", [])) for name in ("unlearned", "retain-only")]
    ours, theirs = (np.sort(ratios or []) for ratios in both)
    if not len(ours) or not len(theirs):
        return
    found = ks_2samp(ours, theirs)
    at = found.statistic_location
    heights = [np.searchsorted(values, at, side="right") / len(values) for values in (ours, theirs)]
    axes.plot([at, at], heights, color="black", linewidth=1.5)
    axes.annotate(f" D = {found.statistic:.2f}", (at, np.mean(heights)), fontsize=8)


def empty_axes(x: str, y: str, size: tuple[float, float] = _SIZE) -> Any:
    """Axes of a figure of their own, with labels and a grid; `size` in inches."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=size).subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return axes


def _labelled(drawn: Sequence[Any]) -> list[Any]:
    """The figures in which something is drawn, with legends under the axes, where they cover nothing."""
    figures = []
    for axes in drawn:
        if labels := axes.get_legend_handles_labels()[1]:
            columns = min(len(labels), 3 if max(map(len, labels)) < 14 else 2)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns)
            figures.append(axes.figure)
    return figures
