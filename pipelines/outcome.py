"""What a finished run leaves for people: metrics, report and model card in its folder, and a summary to read."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from components.config import Recipe, objective_name
from components.console import number
from components.evaluation.exchange import open_unlearning_log
from components.evaluation.report import (
    HEADLINE,
    Sample,
    metrics_columns,
    metrics_table,
    write_model_card,
    write_report,
)
from components.evidence import Evaluated
from components.files import read_lines, write_whole
from components.tracking.gates import GateResult, gate_cells, gate_head, gate_table, is_of_run
from components.urls import shown_url
from pipelines.cli import tracking_uri


class Outcome(NamedTuple):
    """Everything that reports tell of a run."""

    recipe: Recipe
    folder: Path
    evaluated: dict[str, Evaluated]
    """By model: original, unlearned, retain-only, as far as they were evaluated."""
    records: dict[str, pa.Table]
    """What the metrics were computed from."""
    samples: dict[str, list[Sample]]
    """By question set."""
    gates: list[GateResult]
    problems: list[str]
    """What is wrong with the model whatever the gates say."""
    facts: dict[str, str]
    """How the model was made."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """By model and name."""
        return {name: evaluated.values for name, evaluated in self.evaluated.items()}

    def verdict(self) -> str:
        """What the gates say that can be judged by now."""
        failed = sum(not gate.passed for gate in self.gates)
        later = sum(not is_of_run(gate) for gate in self.recipe.gates)
        told = [f"{failed} of {len(self.gates)} gates do not hold" if failed else "gates hold"] if self.gates else []
        told += [f"{later} more to be judged by promote.py"] if later else []
        return "; ".join([*self.problems, *told]) or "no gates"


def empty_answers(records: Mapping[str, pa.Table]) -> str:
    """How many questions each model answers with nothing, where it does."""
    counts = {name: sum(text == "" for text in table["generated"].to_pylist()) for name, table in records.items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def write_files(outcome: Outcome) -> None:
    """`eval/*.json`, `report.html` and `model/README.md` in the run folder."""
    folder, title = outcome.folder, outcome.folder.name
    lines = read_lines(folder / "metrics.jsonl")
    (folder / "eval").mkdir(exist_ok=True)
    write_report(
        folder / "report.html", title, outcome.facts, outcome.evaluated, outcome.records, lines, outcome.samples,
        [gate_head(), *gate_cells(outcome.gates)] if outcome.gates else [], outcome.verdict(),
    )  # fmt: skip
    if outcome.metrics:
        write_whole(folder / "eval" / "metrics_table.json", json.dumps(metrics_columns(outcome.evaluated)))
    if "real_authors" in outcome.recipe.evaluation.sets and "unlearned" in outcome.evaluated:
        log, summary = open_unlearning_log(outcome.evaluated["unlearned"], outcome.records["unlearned"].to_pylist())
        write_whole(folder / "eval" / "TOFU_EVAL.json", json.dumps(log, indent=2))
        write_whole(folder / "eval" / "TOFU_SUMMARY.json", json.dumps(summary, indent=2))
    write_model_card(folder / "model" / "README.md", title, outcome.facts, outcome.metrics)


def shown_summary(summary: Mapping[str, Any]) -> str:
    """What the terminal shows of a finished run: metrics, sample answers, then gates and places."""
    return "\n\n".join(text for key in ("metrics_text", "samples_text", "text") if (text := summary[key]))


def summary_texts(outcome: Outcome, version: str, run: tuple[str, str] | None) -> dict[str, str]:
    """The parts of the summary, sample answers apart; `run`: ids of MLflow's experiment and run."""
    samples = []
    told = [] if outcome.recipe.data.requests else outcome.samples.get("forget", [])  # logs are not purged
    for sample in told:
        answers = {"right": sample.answer, "before": sample.before, "after": sample.after}
        samples.append("\n".join([f"Q       {sample.question}", *(f"  {k:<8}{v}" for k, v in answers.items())]))
    blocks = []
    if outcome.gates:
        blocks.append(gate_table(outcome.gates))
    uri = shown_url(tracking_uri(outcome.recipe))
    local = not uri.startswith("http")
    page = "http://127.0.0.1:5000" if local else uri
    if run:
        page += f"/#/experiments/{run[0]}/runs/{run[1]}?workflowType=machine_learning"
    report = f"{outcome.folder / 'report.html'}"
    if outcome.recipe.data.requests:
        report += ", with sample answers, which are not shown here since deletion requests choose the rows"
    server = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    places = {
        "run folder": str(outcome.folder),
        "report": report,
        "model": f"{outcome.folder / 'model'} = {version}, {outcome.verdict()}",
        **({"MLflow": f"{server}, then", "": page} if local else {"MLflow": page}),
    }
    blocks.append("\n".join(f"{key:<11} {value}" for key, value in places.items()))
    return {
        "metrics_text": metrics_table(outcome.metrics) if outcome.metrics else "",
        "samples_text": "\n\n".join(samples),
        "text": "\n\n".join(blocks),
    }


def description(outcome: Outcome) -> str:
    """What MLflow shows of the run and the model's version, in Markdown."""
    names = [
        name
        for name in (*HEADLINE, "forget_probability", "forget_rouge")
        if any(name in m for m in outcome.metrics.values())
    ]
    head = f"| | {' | '.join(outcome.metrics)} |\n|---|{'---:|' * len(outcome.metrics)}"
    rows = [f"| {n} | " + " | ".join(number(m.get(n)) for m in outcome.metrics.values()) + " |" for n in names]
    facts = [
        f"- {key}: {value}" for key, value in outcome.facts.items() if key in ("recipe", "data", "training", "command")
    ]
    made = f"{objective_name(outcome.recipe)} with {outcome.recipe.optimizer.type}; {outcome.verdict()}."
    return "\n".join([made, "", head, *rows, "", *facts])
