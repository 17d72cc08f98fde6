"""The outcome for people: a table for the terminal, one self-contained HTML page, and the model's card."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.console import number, table
from components.evaluation.evaluate import Evaluated, better, compared
from components.evaluation.membership import auc, min_k
from components.evaluation.metrics import GENERATED, Row, by_set, has, log_truth_ratios, probability

Metrics = Mapping[str, float]
Change = tuple[float, float, float]
"""Difference of a metric, and its interval."""

HEADLINE = ("forget_quality", "model_utility")
SHOWN = ("_probability", "_rouge", "_exact_match", "_truth_ratio", "mia_min_k", "privleak")  # in a terminal
NOTE = (
    "Unlearning lowers the measured probability of the forget answers. It does not prove that every trace is gone: "
    "other phrasings, further training or access to the weights may bring parts of them back."
)


class Sample(NamedTuple):
    """One question with two models' greedy answers."""

    question: str
    answer: str
    before: str
    after: str


def metrics_table(models: Mapping[str, Metrics], everything: bool = False) -> str:
    """The main metrics as rows with the way that is good, models as columns; headline metrics first."""
    names = [name for name in metric_names(models) if everything or _is_main(name)]
    rows = [[f"{name} {arrow(name)}", *(number(metrics.get(name)) for metrics in models.values())] for name in names]
    return table(["metric", *models], rows)


def _is_main(name: str) -> bool:
    return name in HEADLINE or name.endswith(SHOWN) or name.startswith("lm_eval_")


def changes_table(models: Mapping[str, Mapping[str, Change]], everything: bool = False) -> str:
    """The main metrics' differences between models as `compared` gives them; * where the interval leaves out 0."""
    names = dict.fromkeys(name for changes in models.values() for name in changes)
    rows = [
        [f"{name} {arrow(name)}", *(change_text(changes.get(name)) for changes in models.values())]
        for name in names
        if everything or _is_main(name)
    ]
    return table(["metric", *models], rows)


def change_text(change: Change | None) -> str:
    """`+0.12 [0.1, 0.14]*`."""
    if change is None:
        return number(None)
    value, low, high = change
    sign = "+" if value > 0 else ""
    return f"{sign}{number(value)} [{number(low)}, {number(high)}]" + "*" * ((low > 0 or high < 0) and low < high)


def metric_names(models: Mapping[str, Metrics]) -> list[str]:
    """Every metric that some model has, the headline ones first."""
    names = dict.fromkeys(name for metrics in models.values() for name in metrics)
    return [name for name in HEADLINE if name in names] + [name for name in names if name not in HEADLINE]


def arrow(name: str) -> str:
    """Which way a metric is good: ↑, ↓, or → the best value; nothing where nobody can tell."""
    way = better(name)
    return {"higher": "↑", "lower": "↓"}.get(way, f"→{way}" if way else "")


def telling_samples(before: pa.Table, after: pa.Table, set_name: str, count: int = 3) -> list[Sample]:
    """Questions of a set with both models' greedy answers, those that tell most.

    Of what must be forgotten the most and, last, the least changed one; elsewhere those whose right answer's
    probability fell most.
    """
    old, new = (by_set(table)[set_name] for table in (before, after))
    if not has([*old, *new], GENERATED):
        return []
    change = [probability(b) - probability(a) for a, b in zip(old, new, strict=True)]
    order = [int(i) for i in np.argsort(change, kind="stable")]
    chosen = order[:count]
    if set_name == "forget" and len(order) > count:
        chosen = [*order[: count - 1], order[-1]]
    return [Sample(old[i]["question"], old[i]["answer"], old[i]["generated"], new[i]["generated"]) for i in chosen]


def write_report(
    file: Path, title: str, facts: Mapping[str, str], models: Mapping[str, Evaluated],
    records: Mapping[str, pa.Table], lines: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[Sample]],
    gates: Sequence[Sequence[str]],
) -> None:  # fmt: skip
    """One HTML file without outside references."""
    values = {name: evaluated.values for name, evaluated in models.items()}
    missing = {metric: why for evaluated in models.values() for metric, why in evaluated.missing.items()}
    both = {"original", "unlearned"} <= {*models}
    changes = compared(models["unlearned"], models["original"]) if both else {}
    headline = [name for name in metric_names(values) if name in HEADLINE]
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        _table([("", *models)], [[n, *(number(m.get(n)) for m in values.values())] for n in headline]),
        "<h2>Gates</h2>" + _table([("metric", "value", "condition", "bound", "outcome")], gates) if gates else "",
        f"<h2>Forgetting against utility</h2>{_figure(_plane(values))}",
        f"<h2>Can it be told that something was forgotten?</h2>{_figure(_told_apart(records))}" if records else "",
        f"<h2>Course of training</h2>{_figure(_curves(lines))}" if lines else "",
        "<h2>Answers before and after</h2><p>Forget: the most changed and, last, the least changed; other sets: those "
        "whose right answer became least likely.</p>",
        *(
            f"<h3>{html.escape(name)}</h3>" + _table([("question", "right answer", "before", "after")], rows)
            for name, rows in shown.items()
            if rows
        ),
        "<h2>All metrics</h2><p>95 % bootstrap intervals over the rows; of the difference on the same rows, * where"
        " it leaves out 0. ↑: higher is better, ↓: lower, →: this.</p>",
        _table(
            [("", "", *models, *(["unlearned − original"] if changes else []))],
            [_metric_row(name, models, changes) for name in metric_names(values)],
        ),
        "<p>Not computed:</p>" + _table([], list(missing.items())) if missing else "",
        "<h2>How this was made</h2>" + _table([], list(facts.items())),
        f"<p>{NOTE}</p>",
    ]
    file.write_text(_PAGE.format(title=html.escape(title), body="\n".join(sections)), encoding="utf-8")


def write_model_card(file: Path, title: str, facts: Mapping[str, str], models: Mapping[str, Metrics]) -> None:
    """README.md of the exported model."""
    header = "| metric | " + " | ".join(models) + " |\n|---|" + "---:|" * len(models)
    rows = [f"| {n} | " + " | ".join(number(m.get(n)) for m in models.values()) + " |" for n in metric_names(models)]
    made = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    file.write_text(
        f"---\nlibrary_name: transformers\ntags: [unlearning]\n---\n# {title}\n\n{made}\n\n{header}\n"
        + "\n".join(rows)
        + f"\n\n{NOTE}\n",
        encoding="utf-8",
    )


def _table(head: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + "".join(cells(r, "th") for r in head) + "".join(cells(r, "td") for r in rows) + "</table>"


def _metric_row(name: str, models: Mapping[str, Evaluated], changes: Mapping[str, Change]) -> list[str]:
    cells = []
    for evaluated in models.values():
        low_high = evaluated.intervals.get(name)
        shown = f" [{number(low_high[0])}, {number(low_high[1])}]" if low_high else ""
        cells.append(number(evaluated.values.get(name)) + shown)
    return [name, arrow(name), *cells, *([change_text(changes.get(name))] if changes else [])]


def _told_apart(records: Mapping[str, pa.Table]) -> Any:
    """Truth ratios of the forget rows with the largest distance to retain-only's, and the ROC of min-k."""
    from matplotlib.figure import Figure

    of = {name: by_set(table) for name, table in records.items()}
    figure = Figure(figsize=(9.2, 3.8))
    left, right = figure.subplots(1, 2)
    for name, sets in of.items():
        forget = sets.get("forget", [])
        if found := log_truth_ratios(forget):
            ratios = np.sort(found)
            left.step(ratios, np.arange(1, len(ratios) + 1) / len(ratios), where="post", label=name)
        members, others = (np.array([min_k(row) for row in sets.get(s, [])]) for s in ("forget", "holdout"))
        if len(members) and len(others):
            limits = np.sort(np.concatenate([members, others, [-np.inf]]))[::-1]
            rates = [(np.mean(members > limit), np.mean(others > limit)) for limit in limits]
            right.plot(*zip(*rates, strict=True), label=f"{name}, AUC {auc(members, others):.2f}")
    _mark_distance(left, of)
    left.set_xlabel("log truth ratio of forget rows")
    left.set_ylabel("share of rows below")
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    right.set_xlabel("forget rows taken for unseen")
    right.set_ylabel("unseen rows taken for unseen (min-k)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _mark_distance(axes: Any, of: Mapping[str, dict[str, list[Row]]]) -> None:
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


def _plane(models: Mapping[str, Metrics]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    for name, metrics in models.items():
        if "forget_probability" in metrics and "model_utility" in metrics:
            axes.scatter(metrics["forget_probability"], metrics["model_utility"], s=60, label=name)
    axes.set_xlabel("probability of forget answers (lower is better)")
    axes.set_ylabel("model utility (higher is better)")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower center", ncols=len(models))
    return figure


def _curves(lines: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    present = dict.fromkeys(key for line in lines for key in line)  # a step that was left out has few
    panels = [
        ("terms", [key for key in present if key.startswith("train/") and key.endswith("_loss")]),
        ("gradient norm", [key for key in present if key == "train/grad_norm"]),
        ("clip fraction", [key for key in present if key == "train/clip_fraction"]),
        ("probe", [key for key in present if key.startswith("probe/")]),
    ]
    panels = [(title, keys) for title, keys in panels if keys]
    figure = Figure(figsize=(3.6 * len(panels), 3.2))
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in keys:
            having = [line for line in lines if key in line]
            axes.plot([x["step"] for x in having], [x[key] for x in having], label=key.removeprefix("train/"))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=8)
    return figure


def _figure(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
</style></head><body>
{body}
</body></html>
"""
