"""Files, hub data sets and the made-up benchmark as one thing: records with the place they came from."""

import csv
import functools
import glob
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from components.config import Files, HuggingFace, People, Source, digest
from components.data.people import people_rows
from components.errors import DataError


class Record(NamedTuple):
    """One record, or why it cannot be read."""

    line: int
    """Place in the file: line number for text formats, else row number; from 1."""
    fields: dict[str, Any] | None
    """None when the line cannot be read."""
    error: str | None = None
    raw: str | None = None


def source_files(source: Source) -> list[str]:
    """What one task reads: absolute paths for files, one name for the other kinds.

    Raises:
        DataError: when a path or glob matches nothing.
    """
    if isinstance(source, People):
        return [f"people:{source.split}"]
    if isinstance(source, HuggingFace):
        return [str(Path(source.path).resolve()) if Path(source.path).is_dir() else source.path]
    found: list[str] = []
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"Data file not found (path={pattern}). Expected a file or a glob that matches one.")
        found += [str(Path(match).resolve()) for match in matches]
    return found


def fingerprint(source: Source) -> str:
    """Hex digest that changes with the content read: file bytes, hub id and revision, or the benchmark's settings."""
    if isinstance(source, People):
        return digest(source.model_dump(mode="json"), 64)
    if isinstance(source, HuggingFace) and not Path(source.path).is_dir():
        return digest([source.model_dump(mode="json"), hub_commit(source.path, source.revision)], 64)
    total = hashlib.sha256()
    for name in source_files(source):
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


@functools.cache
def hub_commit(path: str, revision: str | None) -> str:
    """The commit that a hub data set stands at; what `revision` says where the hub client is told to stay offline.

    Raises:
        DataError: at once, when the hub or the data set is out of reach.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return f"offline:{revision}"
    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=10).sha)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataError(_UNREACHABLE.format(path=path, error=type(error).__name__)) from error


def read_records(source: Source, file: str) -> Iterator[Record]:
    """The records of one of `source_files(source)`, at most `source.limit`; unreadable lines come with an error.

    Raises:
        DataError: when the file as a whole cannot be read.
    """
    if isinstance(source, People):
        settings = source.model_dump(include={"people", "forget_people", "holdout_people", "seed"})
        records: Iterator[Record] = _numbered(people_rows(source.split, **settings))
    elif isinstance(source, HuggingFace):
        records = _read_hugging_face(source, file)
    else:
        records = _read_file(source, file)
    for count, record in enumerate(records):
        if source.limit is not None and count >= source.limit:
            return
        yield record


def _numbered(rows: Iterable[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield Record(number, row)
        else:
            yield Record(number, None, "not a JSON object", json.dumps(row, default=str))


def _read_file(source: Files, file: str) -> Iterator[Record]:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            yield from _read_parquet(file)
        elif kind == ".csv":
            yield from _read_csv(file)
        elif kind in (".json", ".jsonl", ".ndjson"):
            yield from _read_json(file)
        else:
            raise DataError(f"Data file has an unknown suffix (path={file}). Expected .jsonl, .json, .csv or .parquet.")
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"Data file cannot be read (path={file}): {error}. Expected a whole {kind} file.") from error


def _open(file: str, mode: str) -> Any:
    return gzip.open(file, mode) if file.endswith(".gz") else open(file, mode)


def _read_parquet(file: str) -> Iterator[Record]:
    import pyarrow.parquet as pq

    def rows() -> Iterator[dict[str, Any]]:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()

    return _numbered(rows())


def _read_csv(file: str) -> Iterator[Record]:
    with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(2**31 - 1)  # the default refuses answers longer than 128 KiB
        reader = csv.DictReader(stream)
        for row in reader:
            if None in row or None in row.values():
                yield Record(reader.line_num, None, "number of fields differs from the header's", json.dumps(str(row)))
            else:
                yield Record(reader.line_num, row)


def _read_json(file: str) -> Iterator[Record]:
    """JSON lines, or one JSON array when the file begins with `[`."""
    with _open(file, "rb") as stream:
        if stream.peek(64).lstrip()[:1] == b"[":
            yield from _numbered(json.loads(stream.read()))
            return
        for number, line in enumerate(stream, start=1):
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield Record(number, None, "not UTF-8", repr(line))
            except json.JSONDecodeError as error:
                yield Record(number, None, f"not JSON: {error.msg}", line.decode())
            else:
                is_object = isinstance(fields, dict)
                yield Record(number, fields) if is_object else Record(number, None, "not a JSON object", line.decode())


def _read_hugging_face(source: HuggingFace, path: str) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(
                path, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        yield from _numbered(rows)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        kind = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(_UNREACHABLE.format(path=f"{source.path}, split={source.split}", error=kind)) from error


_UNREACHABLE = (
    "Data set cannot be loaded (path={path}): {error}. Expected a hub id within reach or a folder written by "
    "datasets.save_to_disk. Without network, give the files with type: files."
)
