"""Files, hub data sets and the made-up benchmark as one thing: records with the place they came from."""

import csv
import functools
import gzip
import io
import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.config import Files, FixedAnswers, HuggingFace, People, PoolSource, Text, digest
from components.data import locations
from components.data.people import people_rows
from components.errors import DataError

_TEXT_BLOCK = 1 << 16  # characters that plain text is tokenised in at once
_CSV_LINES = 5000  # lines that a record may span: more come from a quote that is never closed


class Record(NamedTuple):
    """One record, or why it cannot be read."""

    line: int
    """Place in the file: line number for text formats, else row number; from 1."""
    data: bytes
    """The record as a JSON object, or what could be read of it."""
    error: str | None = None


class Reading(NamedTuple):
    """A file being read."""

    records: Iterator[Record]
    fraction: Callable[[], float | None]
    """How much of the file has been read, from 0 to 1; None where nobody can tell."""


def source_files(source: PoolSource) -> list[str]:
    """What one task reads: absolute paths or URLs for files, one name for the other kinds.

    Raises:
        DataError: when a path or glob matches nothing.
    """
    if isinstance(source, People):
        return [f"people:{source.split}"]
    if isinstance(source, FixedAnswers):
        return ["recipe"]
    if isinstance(source, HuggingFace):
        return [str(Path(source.path).resolve()) if Path(source.path).is_dir() else source.path]
    return locations.find(source.path)


def fingerprint(source: PoolSource, storage: Path) -> str:
    """Hex digest that changes with the content read: of files, a hub data set's commit, or the settings themselves.

    Deletion requests that choose among the records count too.
    """
    requests = [getattr(source, key, None) for key in ("requested", "not_requested")]
    digests = [locations.content_digest(locations.find(path)[0], storage / "fingerprints") for path in requests if path]
    own = _own_fingerprint(source, storage)
    return digest([own, *digests], 64) if digests else own


def _own_fingerprint(source: PoolSource, storage: Path) -> str:
    if isinstance(source, People | FixedAnswers):
        return digest(source.model_dump(mode="json"), 64)
    if isinstance(source, HuggingFace) and not Path(source.path).is_dir():
        return digest([source.model_dump(mode="json"), hub_commit(source.path, source.revision)], 64)
    files = []
    for name in source_files(source):
        path = Path(name)
        whole = path.is_dir() and not locations.is_remote(name)
        files += [str(file) for file in sorted(path.rglob("*")) if file.is_file()] if whole else [name]
    return digest([locations.content_digest(file, storage / "fingerprints") for file in files], 64)


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


def read_records(source: PoolSource, file: str) -> Iterator[Record]:
    """The records of one of `source_files(source)`; see `open_records`."""
    return open_records(source, file).records


def open_records(source: PoolSource, file: str) -> Reading:
    """Read one of `source_files(source)`, at most `source.limit` records; unreadable lines come with an error.

    Raises:
        DataError: when the file as a whole cannot be read.
    """
    if isinstance(source, FixedAnswers):
        return Reading(_numbered([{"text": text} for text in source.texts]), lambda: None)
    if isinstance(source, People):
        settings = source.model_dump(include={"people", "forget_people", "holdout_people", "seed"})
        reading = Reading(_numbered(people_rows(source.split, **settings)), lambda: None)
    elif isinstance(source, HuggingFace):
        reading = Reading(_read_hugging_face(source, file), lambda: None)
    else:
        reading = _read_file(source, file)
    limit = None if isinstance(source, Text) else source.limit  # a text's is of lines
    return reading._replace(records=_first(reading.records, limit))


def _first(records: Iterator[Record], limit: int | None) -> Iterator[Record]:
    for count, record in enumerate(records):
        if limit is not None and count >= limit:
            return
        yield record


def _numbered(rows: Iterable[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        data = json.dumps(row, default=_plain).encode()
        yield Record(number, data, None if isinstance(row, dict) else "not a JSON object")


def _plain(value: Any) -> str:
    """Bytes as text (what is not UTF-8 is found out later), dates and decimals as they are written."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


# --- files -----------------------------------------------------------------------------------------------------------


def _read_file(source: Files | Text, file: str) -> Reading:
    kind = "text" if isinstance(source, Text) else _format(source, file)
    if kind == "parquet":
        return _guarded(_read_parquet(file), file, kind)
    try:
        raw = locations.open_file(file)
        total = max(1, locations.size(file))
    except OSError as error:
        raise DataError(f"Data file cannot be read (path={file}): {error.strerror}. Expected a file.") from error
    stream = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw if hasattr(raw, "peek") else _buffered(raw)
    readers: dict[str, Callable[[Any], Iterator[Record]]] = {
        "csv": _read_csv,
        "json": functools.partial(_read_json, may_be_array=".jsonl" not in file and ".ndjson" not in file),
        "lines": _read_lines,
        "text": functools.partial(_read_text, limit=source.limit),
    }
    reading = Reading(readers[kind](stream), lambda: 1.0 if raw.closed else min(1.0, raw.tell() / total))
    return _guarded(reading, file, kind)


def _buffered(stream: Any) -> Any:
    return io.BufferedReader(stream, 1 << 20)


def _format(source: Files, file: str) -> str:
    if source.format != "auto":
        return source.format
    suffixes = [suffix for suffix in PurePosixPath(file).suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    known = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if suffix not in known:
        raise DataError(
            f"Data file has an unknown suffix (path={file}). Expected .jsonl, .json, .csv or .parquet, or the source's "
            "format said; plain text has type: text."
        )
    return known[suffix]


def _guarded(reading: Reading, file: str, kind: str) -> Reading:
    def records() -> Iterator[Record]:
        try:
            yield from reading.records
        except (OSError, EOFError, ValueError, zlib.error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"Data file cannot be read (path={file}): {error}. Expected a whole {kind} file."
            ) from error

    return reading._replace(records=records())


def _read_parquet(file: str) -> Reading:
    import pyarrow.parquet as pq

    done = 0
    total: int | None = None

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal done, total
        with pq.ParquetFile(locations.open_file(file, random_access=True)) as table:
            total = table.metadata.num_rows
            for batch in table.iter_batches(batch_size=1024):
                yield from _rows_of(batch)
                done += batch.num_rows

    return Reading(_numbered(rows()), lambda: done / total if total else None)


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a text that is not UTF-8: as bytes, it sets aside its own row and no other
        import pyarrow as pa

        text = (pa.string(), pa.large_string())
        fields = [pa.field(f.name, pa.binary() if f.type in text else f.type) for f in batch.schema]
        return batch.cast(pa.schema(fields)).to_pylist()


def _read_csv(stream: Any) -> Iterator[Record]:
    """A quote that is never closed sets aside its own line; reading goes on with the next one."""
    # Bytes that are not UTF-8 become lone surrogates here, which set aside their own row and no other.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # the default refuses answers longer than 128 KiB
    again: deque[str] = deque()  # lines to be read once more
    span: list[str] = []  # lines of the record being read

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else text.readline():
            span.append(line)
            if len(span) > _CSV_LINES:
                raise csv.Error(f"record of more than {_CSV_LINES} lines")
            yield line

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    first = 1
    while True:
        span.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(first, span[0].rstrip("\r\n").encode(errors="surrogateescape"), f"not CSV: {error}")
            again.extendleft(reversed(span[1:]))
            first += 1
            reader = csv.reader(lines(), strict=True)
            continue
        if header is None:
            header = row
        elif row and len(row) != len(header):
            yield Record(first, json.dumps(row).encode(), "number of fields differs from the header's")
        elif row:
            yield Record(first, json.dumps(dict(zip(header, row, strict=True))).encode())
        first += len(span)


def _read_json(stream: Any, may_be_array: bool) -> Iterator[Record]:
    """JSON lines as they are, to be parsed by whoever uses them, or one JSON array when the file begins with `[`."""
    if may_be_array and stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _numbered(json.loads(stream.read().decode("utf-8-sig")))
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield Record(number, line.rstrip(b"\r\n"))


def _read_lines(stream: Any) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _text_record(number, line.rstrip(b"\r\n"))


def _read_text(stream: Any, limit: int | None) -> Iterator[Record]:
    """Blocks of whole lines; a line that is not UTF-8 is a record of its own."""
    block: list[str] = []
    length, first = 0, 1
    for number, line in enumerate(itertools.islice(stream, limit), start=1):
        try:
            block.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield Record(number, line, "not UTF-8")
            continue
        length += len(block[-1])
        if length >= _TEXT_BLOCK:
            yield Record(first, json.dumps({"text": "".join(block)}).encode())
            block, length, first = [], 0, number + 1
    if "".join(block).strip():
        yield Record(first, json.dumps({"text": "".join(block)}).encode())


def _text_record(number: int, line: bytes) -> Record:
    try:
        return Record(number, json.dumps({"text": line.decode("utf-8-sig")}).encode())
    except UnicodeDecodeError:
        return Record(number, line, "not UTF-8")


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _read_hugging_face(source: HuggingFace, path: str) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(
                path, source.subset, data_dir=source.data_dir, split=source.split, revision=source.revision,
                streaming=True,
            )  # fmt: skip
        yield from _numbered(rows)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        kind = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(_UNREACHABLE.format(path=f"{source.path}, split={source.split}", error=kind)) from error


_UNREACHABLE = (
    "Data set cannot be loaded (path={path}): {error}. Expected a hub id within reach or a folder written by "
    "datasets.save_to_disk. Without network, give data.folder or the files with type: files."
)
