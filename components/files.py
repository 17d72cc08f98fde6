"""Files and folders that are whole or absent: written under a temporary name, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from components.errors import StorageError


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
    return StorageError(
        f"{what} cannot be written ({', '.join(about)}): {getattr(error, 'strerror', None) or error}. Expected space "
        "and the right to write. What was there before is whole; make room and give the same command again."
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
    """Write `text` to `file`."""
    partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


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
