"""Files, hub data sets and the made-up benchmark as one thing: records with the place they came from."""

import codecs
import csv
import functools
import io
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.config import Files, FixedAnswers, HuggingFace, People, PoolSource, Text, digest
from components.data import contents, filters, locations
from components.data.people import people_rows
from components.errors import DataError

_TEXT_BLOCK = 1 << 16  # characters that plain text is tokenised in at once
_SAMPLE_LINES = 50  # that tell what separates a CSV file's fields
_CSV_LINES = 5000  # lines that a record may span: more come from a quote that is never closed
_SEPARATORS = ",;\t|"
_ROWS_AT_ONCE = 1024
_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_SPACE = re.compile(r"[ \t\r\n]*")


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
        DataError: when a path or glob matches nothing, a file is of an unknown kind, or `where` does not fit it.
    """
    if isinstance(source, People):
        return [f"people:{source.split}"]
    if isinstance(source, FixedAnswers):
        return ["recipe"]
    if isinstance(source, HuggingFace):
        return [str(Path(source.path).resolve()) if Path(source.path).is_dir() else source.path]
    files = locations.find(source.path)
    if isinstance(source, Files):
        for file in files:
            _check_where(source, file, _kind(source, file))
    return files


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
    kind = "text" if isinstance(source, Text) else _kind(source, file)
    if kind in ("parquet", "arrow"):
        return _guarded((_read_parquet if kind == "parquet" else _read_arrow)(file), file, kind)
    total = max(1, locations.size(file))
    with contents.reading(file, kind):
        stream, raw = contents.open_text(file)
    suffix = _suffix(file)
    readers: dict[str, Callable[[Any], Iterator[Record]]] = {
        "csv": functools.partial(_read_csv, file=file, separator="\t" if suffix in (".tsv", ".tab") else None),
        "json": functools.partial(_read_json, named_lines=suffix in (".jsonl", ".ndjson")),
        "lines": _read_lines,
        "text": functools.partial(_read_text, limit=source.limit),
    }
    reading = Reading(readers[kind](stream), lambda: 1.0 if raw.closed else min(1.0, raw.tell() / total))
    return _guarded(reading, file, kind)


def _suffix(file: str) -> str:
    """The suffix that tells what records a file holds, in small letters."""
    suffixes = [
        suffix for suffix in map(str.lower, PurePosixPath(file).suffixes) if suffix not in contents.PACKED.values()
    ]
    return suffixes[-1] if suffixes else ""


def _kind(source: Files, file: str) -> str:
    """json, csv, parquet, arrow or lines, by the source's format, the suffix, or the content where it is plain."""
    found = source.format if source.format != "auto" else _KINDS.get(_suffix(file))
    if not found:
        with contents.reading(file, "JSON, CSV, Parquet or Arrow"):
            found = contents.looks_like(file)
    if not found:
        raise DataError(
            f"Data file has an unknown suffix (path={file}). Expected .jsonl, .json, .csv, .tsv, .parquet or .arrow, "
            "also with .gz, .bz2, .xz or .zst. Set the source's format, or for plain text its type to text."
        )
    return found


def _check_where(source: Files, file: str, kind: str) -> None:
    """Refuse a filter that no record of a file can decide since all its columns are text."""
    if source.where is None or kind not in ("csv", "lines"):
        return
    try:
        filters.compiled(source.where, filters.TEXT)
    except ValueError as error:
        raise DataError(
            f"Filter does not fit a file in which every column is text (path={file}): {error}. Expected where to "
            'compare texts, such as is_safe == "false" or number(severity) > 1.'
        ) from None


def _guarded(reading: Reading, file: str, kind: str) -> Reading:
    def records() -> Iterator[Record]:
        with contents.reading(file, kind):
            yield from reading.records

    return reading._replace(records=records())


def _read_parquet(file: str) -> Reading:
    import pyarrow.parquet as pq

    done = 0
    total: int | None = None

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal done, total
        with pq.ParquetFile(_open_table(file, "parquet")) as table:
            total = table.metadata.num_rows
            _check_names(table.schema_arrow, file)
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from _rows_of(batch)
                done += batch.num_rows

    return Reading(_numbered(rows()), lambda: done / total if total else None)


def _read_arrow(file: str) -> Reading:
    """Arrow's file format, which is also Feather's, or its stream format, which `datasets` writes."""
    import pyarrow as pa

    def rows() -> Iterator[dict[str, Any]]:
        with _open_table(file, "arrow") as stream:
            whole = stream.read(6) == b"ARROW1"
            stream.seek(0)
            reader = pa.ipc.open_file(stream) if whole else pa.ipc.open_stream(stream)
            _check_names(reader.schema, file)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if whole else reader:
                batch.validate()
                for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield from _rows_of(batch.slice(first, _ROWS_AT_ONCE))

    return Reading(_numbered(rows()), lambda: None)


def _open_table(file: str, kind: str) -> Any:
    stream = locations.open_file(file, random_access=True)
    contents.check_table(stream.read(512), file, kind)
    stream.seek(0)
    return stream


def _check_names(schema: Any, file: str) -> None:
    """Refuse a table that names a column, or a field within one, twice: one of the two would be lost."""
    if twice := _named_twice(list(schema)):
        raise _twice(twice, file)


def _named_twice(fields: list[Any], within: str = "") -> str | None:
    for name, count in Counter(field.name for field in fields).items():
        if count > 1:
            return within + name
    inner = ((_inner_fields(field.type), f"{within}{field.name}.") for field in fields)
    return next(filter(None, itertools.starmap(_named_twice, inner)), None)


def _inner_fields(kind: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return list(kind)
    value = getattr(kind, "value_field", None)  # of a list
    return _inner_fields(value.type) if value else []


def _twice(name: str, file: str) -> DataError:
    return DataError(
        f"Data file names a column twice (path={file}, column={name}). Expected each name once, as only one of the two "
        "could be read. Rename or remove one."
    )


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a text that is not UTF-8: as bytes, it sets aside its own row and no other
        import pyarrow as pa

        text = (pa.string(), pa.large_string())
        fields = [pa.field(f.name, pa.binary() if f.type in text else f.type) for f in batch.schema]
        return batch.cast(pa.schema(fields)).to_pylist()


def _read_csv(stream: Any, file: str, separator: str | None) -> Iterator[Record]:
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

    again.extend(itertools.islice(text, _SAMPLE_LINES))
    first = 1
    if again and (told := re.fullmatch(r"sep=(.)\s*", again[0])):  # as Excel writes it
        separator, first = told[1], 2
        again.popleft()
    separator = separator or _separator(list(again), file)
    reader = csv.reader(lines(), strict=True, delimiter=separator)
    header: list[str] | None = None
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
            reader = csv.reader(lines(), strict=True, delimiter=separator)
            continue
        if header is None:
            header = row or None
            if twice := [name for name, count in Counter(row).items() if name and count > 1]:
                raise _twice(twice[0], file)  # columns without a name no recipe can mean
        elif row and len(row) != len(header):
            yield Record(first, json.dumps(row).encode(), "number of fields differs from the header's")
        elif row:
            yield Record(first, json.dumps(dict(zip(header, row, strict=True))).encode())
        first += len(span)


def _separator(sample: list[str], file: str) -> str:
    """A comma where one parts the first line, else what parts that and the second one into as many fields."""
    rows = {mark: list(itertools.islice(filter(None, csv.reader(sample, delimiter=mark)), 2)) for mark in _SEPARATORS}
    if not sample or len(rows[","][0]) > 1:
        return ","
    fitting = [mark for mark, found in rows.items() if len(found[0]) > 1 and len({*map(len, found)}) == 1]
    if len(fitting) > 1:
        raise DataError(
            f"Separator of a CSV file cannot be told (path={file}, candidates={fitting}). Expected one of them to part "
            "the first lines. Save the file with commas."
        )
    return fitting[0] if fitting else ","


def _read_json(stream: Any, named_lines: bool) -> Iterator[Record]:
    """JSON lines as they are, to be parsed by whoever uses them; or the values of one array, or of objects that span
    lines, where the first lines are none by themselves.
    """
    begin: list[bytes] = []  # up to the second line that is not empty
    while sum(map(bool, map(bytes.strip, begin))) < 2 and (line := stream.readline()):
        begin.append(line)
    first, second = [*filter(None, (line.strip().removeprefix(codecs.BOM_UTF8) for line in begin)), b"", b""][:2]
    array = first[:1] == b"[" and not (named_lines and _is_json(first))
    if array or (first[:1] == b"{" and not _is_json(first) and not (second[:1] == b"{" and _is_json(second))):
        content = b"".join([*begin, stream.read()])
        values = _values(content.decode("utf-8-sig", errors="surrogateescape"))
        records = (Record(i, value.encode(errors="surrogateescape")) for i, value in enumerate(values, start=1))
        if array and not named_lines:
            yield from records
            return
        try:
            found = list(records)
        except (ValueError, RecursionError):  # they are lines, the first of which is damaged
            begin, stream = [], io.BytesIO(content)
        else:
            yield from found
            return
    for number, line in enumerate(itertools.chain(begin, stream), start=1):
        if line.strip():
            yield Record(number, line.rstrip(b"\r\n"))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _values(text: str) -> Iterator[str]:
    """The values of a JSON array, or those that follow each other, each as it is written.

    Raises:
        ValueError: where there is something else.
    """
    place = _after_space(text, 0)
    array = text.startswith("[", place)
    place = _after_space(text, place + array)
    more = not (array and text.startswith("]", place))
    while more:
        start = place
        _, place = _SKIPPING.raw_decode(text, start)
        yield text[start:place]
        place = _after_space(text, place)
        more = text.startswith(",", place) if array else place < len(text)
        place = _after_space(text, place + 1) if array and more else place
    if array:
        if not text.startswith("]", place):
            raise ValueError(f"not JSON: an array is not closed at character {place}")
        place = _after_space(text, place + 1)
    if place < len(text):
        raise ValueError(f"not JSON: something follows at character {place}")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


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


# --- JSON ------------------------------------------------------------------------------------------------------------


def load_json(text: str) -> Any:
    """The value that a JSON text is.

    Raises:
        ValueError: when it is none, or an object in it names a key twice.
    """
    try:
        return _CHECKING.decode(text)
    except _NamedTwice:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ValueError(f"not JSON: {type(error).__name__}") from None


class _NamedTwice(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _NamedTwice(f"key {twice!r} is named twice")
    return found


_CHECKING = json.JSONDecoder(object_pairs_hook=_once)
_SKIPPING = json.JSONDecoder(parse_int=str, parse_float=str)  # tells where a value ends; what it is, `load_json` does


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
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        kind = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(_UNREACHABLE.format(path=f"{source.path}, split={source.split}", error=kind)) from error


_UNREACHABLE = (
    "Data set cannot be loaded (path={path}): {error}. Expected a hub id within reach or a folder written by "
    "datasets.save_to_disk. Without network, give data.folder or the files with type: files."
)
