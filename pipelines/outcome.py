"""What a finished run leaves for people: metrics, report and model card in its folder, and a summary to read."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from components.config import Recipe
from components.evaluation.evaluate import Evaluated
from components.evaluation.exchange import open_unlearning_log
from components.evaluation.report import Sample, metrics_table, write_model_card, write_report
from components.files import read_lines, write_whole
from components.tracking.gates import GateResult, gate_cells, gate_table
from components.tracking.run import tracking_uri
from pipelines.cli import storage_folder


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
    facts: dict[str, str]
    """How the model was made."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """By model and name."""
        return {name: evaluated.values for name, evaluated in self.evaluated.items()}

    @property
    def champion(self) -> bool:
        """There are gates and all hold."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)


def empty_answers(records: Mapping[str, pa.Table]) -> str:
    """How many questions each model answers with nothing, where it does."""
    counts = {name: sum(text == "" for text in table["generated"].to_pylist()) for name, table in records.items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def versions() -> str:
    """Of the libraries that decide numbers."""
    names = ("torch", "transformers", "deepspeed", "ray", "datasets")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def write_files(outcome: Outcome) -> None:
    """`eval/*.json`, `report.html` and `model/README.md` in the run folder."""
    folder, title = outcome.folder, outcome.folder.name
    lines = read_lines(folder / "metrics.jsonl")
    (folder / "eval").mkdir(exist_ok=True)
    for name, values in outcome.metrics.items():
        write_whole(folder / "eval" / f"{name}.json", json.dumps(values, indent=2))
    write_report(
        folder / "report.html", title, outcome.facts, outcome.evaluated, outcome.records, lines, outcome.samples,
        gate_cells(outcome.gates),
    )  # fmt: skip
    everything = {name: evaluated.as_json() for name, evaluated in outcome.evaluated.items()}
    write_whole(folder / "metrics.json", json.dumps(everything, indent=2))
    if "real_authors" in outcome.recipe.evaluation.sets and "unlearned" in outcome.evaluated:
        log, summary = open_unlearning_log(outcome.evaluated["unlearned"], outcome.records["unlearned"].to_pylist())
        write_whole(folder / "eval" / "TOFU_EVAL.json", json.dumps(log, indent=2))
        write_whole(folder / "eval" / "TOFU_SUMMARY.json", json.dumps(summary, indent=2))
    write_model_card(folder / "model" / "README.md", title, outcome.facts, outcome.metrics)


def summary_text(outcome: Outcome, version: str) -> str:
    """Table, sample answers, gates and places, for the terminal."""
    blocks = [metrics_table(outcome.metrics)] if outcome.metrics else []
    for sample in outcome.samples.get("forget", []):
        answers = {"right": sample.answer, "before": sample.before, "after": sample.after}
        blocks.append("\n".join([f"Q       {sample.question}", *(f"  {k:<8}{v}" for k, v in answers.items())]))
    if outcome.gates:
        blocks.append(gate_table(outcome.gates))
    aliases = "candidate and champion" if outcome.champion else "candidate"
    if not outcome.champion:
        aliases += "; gates do not hold" if outcome.gates else "; no gates"
    uri = tracking_uri(outcome.recipe.tracking, storage_folder(outcome.recipe))
    local = uri.startswith("sqlite")
    page = f"{'http://127.0.0.1:5000' if local else uri}/?workflowType=machine_learning"
    places = {
        "run folder": str(outcome.folder),
        "report": str(outcome.folder / "report.html"),
        "model": f"{outcome.folder / 'model'} = {version} ({aliases})",
        "MLflow": f"mlflow ui --backend-store-uri {uri}, then {page}" if local else page,
    }
    blocks.append("\n".join(f"{key:<11} {value}" for key, value in places.items()))
    return "\n\n".join(blocks)
