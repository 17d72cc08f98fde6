"""Remove what a finished run leaves that still holds forgotten rows, or was shaped by them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.config import Recipe
from components.data.rows import PreparedRows
from components.files import write_whole
from pipelines.cli import say, storage_folder


def purge_traces(recipe: Recipe, client: Any, run_id: str) -> dict[str, list[str]]:
    """Remove prepared forget rows, evaluation records, checkpoints and shown answers of the run and its kin.

    Optimizer state goes with the checkpoints: a Hessian averaged over forgotten rows is a memory of them. Returns what
    was removed and what is left, in words.
    """
    run = client.get_run(run_id).data
    folder, storage = Path(run.tags.get("run_folder", "")), storage_folder(recipe)
    left = ["the original model, which knows the records", "backups and other copies of the storage folder"]
    if not folder.is_dir():
        left.append(f"the run folder {folder.name}, which is not on this machine")
        return {"removed": [], "left": left}
    digests = [run.tags.get("data.forget", ""), *_questions(folder)]
    hashes = {row for name in digests for row in _row_ids(storage / "prepared" / name)}
    found = {
        "folders of prepared rows": [storage / "prepared" / name for name in digests],
        "evaluation records": [
            records.parent
            for records in sorted(storage.glob("evaluations/*/records.parquet"))
            if hashes & {*pq.read_table(records, columns=["row_id"])["row_id"].to_pylist()}
        ],
        "folders of checkpoints with optimizer state": [
            folder / "checkpoints",
            *sorted(storage.glob("models/*.checkpoints")),
            *(begun.parent / "checkpoints" for begun in storage.glob("*/begun.json") if _forgets(begun, digests[0])),
        ],
    }
    counts = {what: sum(_gone(place) for place in places) for what, places in found.items()}
    removed = [f"{count} {what}" for what, count in counts.items() if count]
    removed += _shown_answers(folder, client, run_id)
    for line in (*(f"purged: {item}" for item in removed), *(f"left: {item}" for item in left)):
        say(line)
    return {"removed": removed, "left": left}


def _forgets(begun: Path, forget: str) -> bool:
    """Whether an unfinished run is of the same forget rows."""
    return json.loads(begun.read_text()).get("made_from", {}).get("forget") == forget


def _gone(folder: Path) -> bool:
    there = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    return there and not folder.exists()


def _questions(folder: Path) -> list[str]:
    file = folder / "metrics.json"
    return [digest for name, digest in json.loads(file.read_text())["questions"].items() if name == "forget"]


def _row_ids(prepared: Path) -> list[str]:
    return PreparedRows(prepared).table()["row_id"].to_pylist() if prepared.is_dir() else []


def _shown_answers(folder: Path, client: Any, run_id: str) -> list[str]:
    """Report and summary show some forgotten answers: here, and in MLflow."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    removed = []
    if (folder / "report.html").exists():
        (folder / "report.html").unlink()
        removed.append("report with sample answers, in the run folder")
    summary = folder / "summary.json"
    if summary.exists():
        about = json.loads(summary.read_text())
        about["text"] = re.sub(r"(?ms)^Q  .*?(?:\n\n)", "", about["text"])
        write_whole(summary, json.dumps(about, indent=2, ensure_ascii=False))
    if any(item.path == "report.html" for item in client.list_artifacts(run_id)):
        repository = get_artifact_repository(
            client.get_run(run_id).info.artifact_uri, tracking_uri=client.tracking_uri, registry_uri=client.tracking_uri
        )
        repository.delete_artifacts("report.html")
        removed.append("report with sample answers, in MLflow")
    return removed
