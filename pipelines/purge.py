"""Remove what training on forgotten rows left behind, beside the model: caches, optimizer state, answers shown."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.config import PoolSource, Recipe, digest
from components.data.mapping import taken_records
from components.data.requests import whose
from components.errors import ClusterError, DataError, TrackingError
from components.files import only_one, write_whole
from components.tracking.run import without_filter_texts
from components.training.checkpoint_files import Place, remove_all
from pipelines.cli import say, storage_folder
from pipelines.training import checkpoint_place, forget_cache

_CACHES = ("prepared", "evaluations", "reference", "overlap", "attacks")


def purge_traces(recipe: Recipe, client: Any, run_id: str) -> dict[str, list[str]]:
    """Remove all caches of the storage folder, and what runs that held the same records left besides their models.

    Caches are removed whole, since attacks, other settings and the original's own training keep copies under other
    names; they are made again where they are needed. A run is meant when any of its sets or questions takes from a
    source a record that this run was to forget, however its rows are written, and when its forget rows are the same.
    Optimizer state goes with checkpoints: a Hessian averaged over forgotten rows is a memory of them. Returns what is
    gone and what is left, in words, the same however often it is called.

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
    for begun in (*storage.glob("*/begun.json"), *storage.glob("sweeps/*/trial-000/trial.json")):
        try:
            with only_one(begun.parent if begun.name == "begun.json" else begun.parent.parent):
                pass
        except ClusterError as error:
            raise TrackingError(f"Traces cannot be purged now: {error}") from error
    runs, unknown = _runs_holding(storage, folder, forget)
    for found in runs:
        _purge_run(found, client)
    for place in (
        *(storage / name for name in _CACHES),
        *storage.glob("prepared-once-*"),
        *storage.glob("models/*.data"),
    ):
        shutil.rmtree(place, ignore_errors=True)
    gone = [
        "prepared rows, evaluation records and the original's reference passes of all runs in the storage folder",
        "checkpoints with optimizer state, reports and sample answers of all runs that held these records",
    ]
    left = list(_left(storage, folder, runs, unknown))
    for line in (*(f"gone: {item}" for item in gone), *(f"left: {item}" for item in left)):
        say(line)
    return {"gone": gone, "left": left}


def _left(storage: Path, folder: Path, runs: Sequence[Path], unknown: Sequence[Path]) -> Iterator[str]:
    yield "the sources themselves, and the file of requests"
    yield "the original model, which knows the records"
    yield "candidates in MLflow that were not promoted, and earlier champions"
    if count := json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("names_as_tokens"):
        yield f"the tokenizer of all models of the run: {count} of the names are tokens of their own"
    for file in storage.glob("models/*.checkpoints"):
        yield f"checkpoints of fine-tuning that was not finished: {file.name}"
    if filtering := sorted(found.name for found in runs if _names_texts(found)):
        yield f"texts that filters (where) compare with, in config.json, here and in MLflow: {', '.join(filtering)}"
    if unknown:
        names = ", ".join(found.name for found in unknown)
        yield f"reports and checkpoints of runs whose settings or sources cannot be read now: {names}"
    if any((storage / "sweeps").glob("*")):
        yield "settings of sweeps (best.yaml, trials' config.json), with the texts of their filters"
    yield (
        "what was printed: terminals, logs of drivers and of Ray jobs (ray job logs), where runs without deletion "
        "requests show sample answers, and Ray's own folder for temporary files"
    )
    yield "copies and backups made by others"


def _runs_holding(storage: Path, own: Path, forget: str) -> tuple[list[Path], list[Path]]:
    """(folders of runs and trials that held what the run in `own` was to forget, those of which nobody can tell)."""
    reader = _Reader()
    meant = reader.meant(_recipe_of(own))
    runs, unknown = [], []
    for config in sorted([*storage.glob("*/config.json"), *storage.glob("sweeps/*/trial-*/config.json")]):
        folder = config.parent
        try:
            holds = folder == own or _forget_of(folder) == forget or reader.holds(_recipe_of(folder), meant)
        except ValueError:  # of another version
            holds = None
        if holds:
            runs.append(folder)
        elif holds is None:
            unknown.append(folder)
    return runs, unknown


class _Reader:
    """Reads each source once, however many runs name it."""

    def __init__(self) -> None:
        self._known: dict[str, set[str] | None] = {}
        self._requests: str | None = None

    def meant(self, recipe: Recipe) -> set[str]:
        """Digests of the records that `recipe` is to forget; also whichever its deletion requests name, elsewhere."""
        self._requests = recipe.data.requests
        found = [self._records(source) for source in recipe.data.forget]
        return set().union(*(records for records in found if records)) | {_REQUESTED}

    def holds(self, recipe: Recipe, meant: set[str]) -> bool | None:
        """Whether any of a recipe's sets takes such a record; None where one cannot be read, and no other does."""
        data, sets = recipe.data, recipe.evaluation.sets.values()
        sources = [*data.forget, *data.normal, *data.random, *(source for asked in sets for source in asked.rows)]
        found = [self._records(_whole(source)) for source in sources]
        if any(records and records & meant for records in found):
            return True
        return None if None in found else False

    def _records(self, source: PoolSource) -> set[str] | None:
        key = source.model_dump_json()
        if key not in self._known:
            try:
                named = whose(self._requests) if self._requests else lambda fields: []
                found = set()
                for fields in taken_records(source):
                    found |= {digest(json.dumps(fields, sort_keys=True), 32), *([_REQUESTED] if named(fields) else [])}
                self._known[key] = found
            except (DataError, OSError):
                self._known[key] = None
        return self._known[key]


_REQUESTED = "named by a request"


def _whole(source: PoolSource) -> PoolSource:
    """What it may have held before the requests of today."""
    changes = {key: None for key in ("requested", "not_requested") if getattr(source, key, None)}
    return source.model_copy(update=changes) if changes else source


def _recipe_of(folder: Path) -> Recipe:
    return Recipe.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))


def _names_texts(folder: Path) -> bool:
    settings = _recipe_of(folder).model_dump(mode="json")
    return without_filter_texts(settings) != settings


def _forget_of(folder: Path) -> str | None:
    """Digest of a run's forget rows, finished or not."""
    for file in (folder / "summary.json", folder / "begun.json"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8")).get("made_from", {}).get("forget")
    return None


def _purge_run(folder: Path, client: Any) -> None:
    for checkpoints in _checkpoints(folder):
        remove_all(Place(checkpoints))
    (folder / "report.html").unlink(missing_ok=True)
    forget_cache(folder)  # of a run with data.cache=false that was killed
    for place in (folder / "quarantine", *folder.glob("model.partial-*"), *folder.glob("ray-train-*")):
        shutil.rmtree(place, ignore_errors=True)
    summary = folder / "summary.json"
    if summary.exists():
        about = json.loads(summary.read_text(encoding="utf-8"))
        write_whole(summary, json.dumps({**about, "samples_text": ""}, indent=2, ensure_ascii=False))
        _forget_report(client, about.get("mlflow_run_id"))


def _checkpoints(folder: Path) -> Iterator[str]:
    begun = folder / "begun.json"
    if begun.exists() and "id" in (about := json.loads(begun.read_text(encoding="utf-8"))):
        yield checkpoint_place(_recipe_of(folder).train, folder / "checkpoints", f"{folder.name}-{about['id']}")
    elif (folder / "trial.json").exists():
        train = _recipe_of(folder).train
        yield checkpoint_place(train, folder / "checkpoints", f"{folder.parent.name}-{folder.name}")
    yield str(folder / "checkpoints")


def _forget_report(client: Any, run_id: str | None) -> None:
    """MLflow has no call to delete an artifact; its stores have."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if run_id and any(item.path == "report.html" for item in client.list_artifacts(run_id)):
        uri = client.get_run(run_id).info.artifact_uri
        get_artifact_repository(uri, client.tracking_uri, client.tracking_uri).delete_artifacts("report.html")
