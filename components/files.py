"""Files and folders that are whole or absent: written under a temporary name, then renamed."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import pyarrow as pa

from components.errors import ClusterError, StorageError


@contextmanager
def writing(what: str, place: str | Path, needed: int | None = None) -> Iterator[None]:
    """Name `what` was to be written where, and the bytes needed and free, when the system refuses.

    Raises:
        StorageError: in place of any OSError.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise refused(what, place, error, needed) from error


def refused(what: str, place: str | Path, error: Exception, needed: int | None = None) -> StorageError:
    """The error to raise where `what` cannot be written at `place`."""
    about = [f"path={place}", *([f"bytes needed={needed:,}"] if needed else [])]
    if "://" not in str(place):
        with suppress(OSError):
            about.append(f"bytes free={free_bytes(Path(place)):,}")
    expected = "space and the right to write. What was there before is whole; make room and give the same command again"
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        expected = "names of at most 255 bytes in paths of at most 4,095. Choose a shorter storage folder or name"
    return StorageError(
        f"{what} cannot be written ({', '.join(about)}): {getattr(error, 'strerror', None) or error}. "
        f"Expected {expected}."
    )


def free_bytes(place: Path) -> int:
    """Bytes that may still be written under `place`, which need not exist yet."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, so that nobody meets half of one.

    Where someone else made `folder` meanwhile, from the same inputs, theirs stays.
    """
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write `text` to `file`, also for the case that the power fails."""
    partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file, none where there is no file."""
    if not file.exists():
        return []
    with file.open("rb") as stream:
        return [line for line, _ in lines_after(stream, 0)]


def lines_after(stream: BinaryIO, place: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole JSON lines from byte `place` on, each with the place behind it.

    A line that is still being written is left for later; half a line, which a process that was killed or a full disk
    left, is passed over.
    """
    stream.seek(place)
    for line in stream:
        if not line.endswith(b"\n"):
            return
        place += len(line)
        with suppress(ValueError):
            yield json.loads(line), place


def append_line(file: Path, value: dict[str, Any]) -> None:
    """Add a JSON line to `file`; one that was left half written before it is ended first."""
    with file.open("ab+") as stream:
        if stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")
        stream.write(json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Inside, no other process on this file system works on `folder`.

    Raises:
        ClusterError: when one does.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ClusterError(
            f"Run is being worked on already (folder={folder}). Expected one command at a time. Wait for the other one "
            "or stop it."
        ) from None
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


def sha256(file: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_arrow(table: pa.Table, file: Path) -> None:
    """One record batch, uncompressed: read back by `map_arrow`, any row is at hand without decoding its neighbours."""
    partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex[:8]}")
    with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    os.replace(partial, file)


def map_arrow(file: Path) -> pa.Table:
    """A file of `write_arrow`, memory-mapped: only what is touched is read."""
    with pa.memory_map(str(file)) as stream, pa.ipc.open_file(stream) as reader:
        return reader.read_all()
