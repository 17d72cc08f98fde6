"""The outcome for people: a table for the terminal, one self-contained HTML page, and the model's card."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.console import number, table
from components.evaluation.evaluate import better, compared
from components.evaluation.metrics import GENERATED, by_set, has, probability
from components.evaluation.plots import curves, plane, told_apart
from components.evidence import Evaluated
from components.html_page import html_table, images, page, png

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


def metrics_columns(models: Mapping[str, Evaluated]) -> dict[str, Any]:
    """All metrics as MLflow's tables have them: column names, and rows."""
    columns = ["metric", "good", *(f"{name}{part}" for name in models for part in ("", " low", " high"))]
    rows = []
    for metric in metric_names({name: found.values for name, found in models.items()}):
        cells = [[found.values.get(metric), *found.intervals.get(metric, (None, None))] for found in models.values()]
        rows.append([metric, arrow(metric), *(cell for model in cells for cell in model)])
    return {"columns": columns, "data": rows}


def metric_names(models: Mapping[str, Metrics]) -> list[str]:
    """Every metric that some model has, the headline ones first."""
    names = dict.fromkeys(name for metrics in models.values() for name in metrics)
    first = [*HEADLINE, "forget_quality_log10"]
    return [name for name in first if name in names] + [name for name in names if name not in first]


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
    gates: Sequence[Sequence[str]], verdict: str,
) -> None:  # fmt: skip
    """One HTML file without outside references, and its plots beside it in `figures`; `gates` with their header."""
    into = file.with_name("figures")
    into.mkdir(exist_ok=True)
    values = {name: evaluated.values for name, evaluated in models.items()}
    missing = {metric: why for evaluated in models.values() for metric, why in evaluated.missing.items()}
    both = {"original", "unlearned"} <= {*models}
    changes = compared(models["unlearned"], models["original"]) if both else {}
    headline = [name for name in metric_names(values) if name in HEADLINE]
    sections = [
        f"<h1>{html.escape(title)}</h1><p><strong>{html.escape(verdict)}</strong></p>",
        html_table([("", *models)], [[n, *(number(m.get(n)) for m in values.values())] for n in headline], "numbers"),
        "<h2>Gates</h2>" + html_table(gates[:1], gates[1:], "numbers") if gates else "",
        f"<h2>Forgetting against utility</h2>{_figures(plane(values), into)}",
        f"<h2>Can it be told that something was forgotten?</h2>{_figures(told_apart(records), into)}"
        if records
        else "",
        f"<h2>Course of training</h2>{_figures(curves(lines), into)}" if lines else "",
        "<h2>Answers before and after</h2><p>Forget: the most changed and, last, the least changed; other sets: those "
        "whose right answer became least likely.</p>",
        *(
            f"<h3>{html.escape(name)}</h3>" + html_table([("question", "right answer", "before", "after")], rows)
            for name, rows in shown.items()
            if rows
        ),
        "<h2>All metrics</h2><p>95 % bootstrap intervals over the rows; of the difference on the same rows, * where"
        " it leaves out 0. ↑: higher is better, ↓: lower, →: this.</p>",
        html_table(
            [("", "", *models, *(["unlearned − original"] if changes else []))],
            [_metric_row(name, models, changes) for name in metric_names(values)],
            "numbers",
        ),
        "<p>Not computed:</p>" + html_table([], list(missing.items())) if missing else "",
        "<h2>How this was made</h2>" + html_table([], list(facts.items())),
        f"<p>{NOTE}</p>",
    ]
    file.write_text(page(title, sections), encoding="utf-8")


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


def _metric_row(name: str, models: Mapping[str, Evaluated], changes: Mapping[str, Change]) -> list[str]:
    cells = []
    for evaluated in models.values():
        low_high = evaluated.intervals.get(name)
        shown = f" [{number(low_high[0])}, {number(low_high[1])}]" if low_high else ""
        cells.append(number(evaluated.values.get(name)) + shown)
    return [name, arrow(name), *cells, *([change_text(changes.get(name))] if changes else [])]


def _figures(figures: Sequence[Any], into: Path) -> str:
    """Images, also written as files named after what they show."""
    drawn = [(figure.axes[0].get_ylabel().partition(" (")[0], png(figure)) for figure in figures]
    for shows, data in drawn:
        (into / f"{shows.replace(' ', '_')}.png").write_bytes(data)
    return images(drawn)
