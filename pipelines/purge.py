"""Remove what training on forgotten rows left behind, beside the model: caches, optimizer state, answers shown."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.config import Recipe
from components.errors import ClusterError, TrackingError
from components.files import only_one, write_whole
from components.training.checkpoint_files import Place, remove_all
from pipelines.cli import say, storage_folder
from pipelines.training import checkpoint_place

_CACHES = ("prepared", "evaluations", "reference", "overlap")


def purge_traces(recipe: Recipe, client: Any, run_id: str) -> dict[str, list[str]]:
    """Remove all caches of the storage folder, and what runs on the same forget rows left besides their models.

    Caches are removed whole, since attacks, other settings and the original's own training keep copies under other
    names; they are made again where they are needed. Optimizer state goes with checkpoints: a Hessian averaged over
    forgotten rows is a memory of them. Returns what is gone and what is left, in words, the same however often it is
    called.

    Raises:
        TrackingError: when the run cannot be found here, or a run of this storage folder is still going on.
    """
    tags, storage = client.get_run(run_id).data.tags, storage_folder(recipe)
    folder, forget = Path(tags.get("run_folder", "")), tags.get("data.forget")
    if not forget or not (folder / "summary.json").exists() or folder.parent != storage:
        raise TrackingError(
            f"Traces cannot be purged (run={run_id}, folder={folder}). Expected the run's folder in storage={storage}. "
            "Give the same command where the model was trained."
        )
    for begun in storage.glob("*/begun.json"):
        try:
            with only_one(begun.parent):
                pass
        except ClusterError as error:
            raise TrackingError(f"Traces cannot be purged now: {error}") from error
    runs = [found for found in sorted(storage.glob("*/config.json")) if _forget_of(found.parent) == forget]
    for found in runs:
        _purge_run(found.parent, client)
    for name in _CACHES:
        shutil.rmtree(storage / name, ignore_errors=True)
    gone = [
        "prepared rows, evaluation records and the original's reference passes of all runs in the storage folder",
        f"checkpoints with optimizer state, reports and sample answers of {len(runs)} runs on these rows",
    ]
    unfinished = [file.name for file in storage.glob("models/*.checkpoints")]
    left = [
        "the sources themselves, and the file of requests",
        "the original model, which knows the records",
        "candidates in MLflow that were not promoted, and earlier champions",
        *(f"checkpoints of fine-tuning that was not finished: {name}" for name in unfinished),
        "copies and backups made by others",
    ]
    for line in (*(f"gone: {item}" for item in gone), *(f"left: {item}" for item in left)):
        say(line)
    return {"gone": gone, "left": left}


def _forget_of(folder: Path) -> str | None:
    """Digest of a run's forget rows, finished or not."""
    for file in (folder / "summary.json", folder / "begun.json"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8")).get("made_from", {}).get("forget")
    return None


def _purge_run(folder: Path, client: Any) -> None:
    for place in _checkpoints(folder):
        remove_all(Place(place))
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "quarantine", ignore_errors=True)
    summary = folder / "summary.json"
    if summary.exists():
        about = json.loads(summary.read_text(encoding="utf-8"))
        write_whole(summary, json.dumps({**about, "samples_text": ""}, indent=2, ensure_ascii=False))
        _forget_report(client, about.get("mlflow_run_id"))


def _checkpoints(folder: Path) -> Iterator[str]:
    begun = folder / "begun.json"
    if begun.exists() and "id" in (about := json.loads(begun.read_text(encoding="utf-8"))):
        train = Recipe.model_validate_json((folder / "config.json").read_text(encoding="utf-8")).train
        yield checkpoint_place(train, folder / "checkpoints", f"{folder.name}-{about['id']}")
    yield str(folder / "checkpoints")


def _forget_report(client: Any, run_id: str | None) -> None:
    """MLflow has no call to delete an artifact; its stores have."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if run_id and any(item.path == "report.html" for item in client.list_artifacts(run_id)):
        uri = client.get_run(run_id).info.artifact_uri
        get_artifact_repository(uri, client.tracking_uri, client.tracking_uri).delete_artifacts("report.html")
