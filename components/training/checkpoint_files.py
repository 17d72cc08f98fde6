"""Where checkpoints lie: `<place>/step-000030/`, on a disk or in an object store, whole or not trusted.

A folder counts by its `manifest.json` alone, which is written last and names every file with size, sha256 and the
tensors in it. The ranks' files bear a mark of their attempt, so that what a dead one left is never mixed in.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from components.data.locations import is_remote, open_store
from components.errors import StorageError
from components.files import free_bytes, refused, sha256, write_whole

MANIFEST, DAMAGED = "manifest.json", "manifest.damaged.json"


class Place(NamedTuple):
    """A folder of checkpoints."""

    url: str
    """Path, or address in an object store."""

    @property
    def remote(self) -> bool:
        return is_remote(self.url)

    @property
    def store(self) -> Any:
        """With fsspec's interface."""
        return open_store(self.url)[0] if self.remote else LocalFileSystem()

    def path(self, step: int, name: str = "") -> str:
        """Of a checkpoint's folder or one of its files, within the store."""
        root = open_store(self.url)[1] if self.remote else self.url
        return "/".join([root.rstrip("/"), f"step-{step:06d}", *([name] if name else [])])


def steps_kept(place: Place) -> list[int]:
    """Steps with a manifest, newest first."""
    return sorted((step for step, names in _folders(place) if MANIFEST in names), reverse=True)


class Damaged(Exception):
    """A checkpoint is not as it was written."""


def manifest(place: Place, step: int) -> dict[str, Any]:
    """{files: {name: {size, sha256, tensors}}, score}.

    Raises:
        Damaged: when it is no manifest.
        OSError: when it cannot be read.
    """
    try:
        return json.loads(place.store.cat_file(place.path(step, MANIFEST)))
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is no JSON") from error


def write(place: Place, step: int, name: str, make: Callable[[Path], None], needed: int) -> dict[str, Any]:
    """Let `make` write a file of `needed` bytes, and put it durably into the checkpoint. Returns its size and sha256.

    Raises:
        StorageError: when the disk or the store refuses.
    """
    with _local(place, step, name, needed) as file:
        make(file)
        _sync(file)
        about = {"size": file.stat().st_size, "sha256": sha256(file)}
        if place.remote:
            place.store.put_file(str(file), place.path(step, name))
    return about


def free_for(place: Place) -> int:
    """Bytes free on the disk, those of the checkpoints included that will be replaced."""
    own = sum(file.stat().st_size for step in steps_kept(place) for file in Path(place.path(step)).iterdir())
    return free_bytes(Path(place.url)) + own


def write_text(place: Place, step: int, name: str, text: str) -> dict[str, Any]:
    """`write` for a text: readers meet all of it or nothing."""

    about = write(place, step, name, lambda file: write_whole(file, text), len(text))
    if not place.remote:
        _sync(Path(place.path(step)))
    return about


def await_text(place: Place, step: int, name: str, patience: float) -> str:
    """A file that another rank writes.

    Raises:
        TimeoutError: when it is not there after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not place.store.exists(place.path(step, name)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} was not written within {patience:g} s")
        time.sleep(0.5 if place.remote else 0.02)
    return place.store.cat_file(place.path(step, name)).decode()


def fetch(place: Place, step: int, name: str, about: dict[str, Any], into: Path) -> Path:
    """A whole file of a checkpoint, on this machine's disk: remote ones are copied to `into`.

    Raises:
        Damaged: when it is not there, or not as the manifest says.
        OSError: when it cannot be read.
    """
    file = Path(place.path(step, name))
    try:
        if place.remote:
            file = into / name
            place.store.get_file(place.path(step, name), str(file))
        size = file.stat().st_size
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    if size != about["size"]:
        raise Damaged(f"{name} has {size:,} bytes instead of {about['size']:,}")
    if sha256(file) != about["sha256"]:
        raise Damaged(f"{name} has another sha256 than when it was written")
    return file


def set_aside(place: Place, step: int) -> None:
    """Do not trust this one any more, but keep it to look at."""
    place.store.mv(place.path(step, MANIFEST), place.path(step, DAMAGED))


def clear_unfinished(place: Place) -> None:
    """Remove what attempts that were stopped while writing left behind."""
    for step, names in list(_folders(place)):
        if MANIFEST not in names and DAMAGED not in names:
            _remove(place, step)


def prune(place: Place, keep: int, mode: str | None, also: int | None) -> None:
    """Remove all but the newest `keep`, the one with the best score, and the newest that is not after step `also`."""
    found = steps_kept(place)
    kept = set(found[:keep])
    if mode:
        kept |= {best} if (best := best_step(place, mode)) is not None else set()
    if also is not None:
        kept |= set([step for step in found if step <= also][:1])
    for step in set(found) - kept:
        place.store.rm_file(place.path(step, MANIFEST))  # first: half of one must not be trusted
        _remove(place, step)


def best_step(place: Place, mode: str) -> int | None:
    """The step with the lowest (`min`) or highest (`max`) score; of equal ones the newest."""
    scored = [(manifest(place, step)["score"], step) for step in steps_kept(place)]
    scores = [(score, step) for score, step in scored if score is not None and math.isfinite(score)]
    sign = 1 if mode == "max" else -1
    return max(scores, key=lambda scored: (sign * scored[0], scored[1]))[1] if scores else None


def remove_all(place: Place) -> None:
    """Remove all checkpoints, damaged ones too."""
    if not place.remote:
        shutil.rmtree(place.url, ignore_errors=True)
        return
    for step, _ in _folders(place):
        _remove(place, step)


def _remove(place: Place, step: int) -> None:
    if place.remote:
        place.store.rm(place.path(step), recursive=True)
    else:
        shutil.rmtree(place.path(step), ignore_errors=True)


def _folders(place: Place) -> Iterator[tuple[int, set[str]]]:
    """(step, names of the files in it)."""
    root = os.path.dirname(place.path(0))
    for folder in _listed(place, root):
        name = os.path.basename(folder.rstrip("/"))
        if name.startswith("step-") and name.removeprefix("step-").isdigit():
            files = {os.path.basename(file) for file in _listed(place, folder)}
            yield int(name.removeprefix("step-")), files


def _listed(place: Place, folder: str) -> Iterable[str]:
    try:
        return place.store.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(
            f"Checkpoints cannot be looked at (path={place.url}): {str(error)[:200]}. Expected a place within reach, "
            "and for an object store credentials in the environment. Give the same command again."
        ) from error


@contextmanager
def _local(place: Place, step: int, name: str, needed: int) -> Iterator[Path]:
    """Where to write a file; on failure nothing of it stays, so that a full disk is not kept full."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary if place.remote else place.path(step)) / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield file
        except Exception as error:
            with suppress(OSError):
                file.unlink()
            raise refused("Checkpoint", place.url, error, needed) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
