"""Sources → validated, tokenised rows as Parquet, made once by Ray Data and found again by the hash of what made them.

A prepared folder holds `rows/*.parquet` (good and bad rows, told apart by `error`), `quarantine.jsonl` (the bad ones
with file, line, reason and text), `summary.json` (counts) and the `tokenizer.json` that was used.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.dataset
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from components.config import Data, Source, digest
from components.data.prompts import Encoder
from components.data.sources import Record, fingerprint, read_records, source_files
from components.errors import DataError
from components.files import whole_folder

Kind = Literal["pairs", "answers", "questions"]
"""pairs: prompt with one answer, for training. answers: the pool of random responses. questions: a prompt with a
right answer, its paraphrase and wrong answers, for evaluation."""

_FORMAT = 1  # raise when the columns or their meaning change: old folders are then made anew
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "source": pa.int32(), "line": pa.int64(), "file": pa.string(), "error": pa.string(), "raw": pa.string(),
        "row_id": pa.string(), "input_ids": _IDS, "answer_start": pa.int32(),
        "question": pa.string(), "answer": pa.string(), "answers": pa.list_(_IDS), "paraphrased": pa.bool_(),
    }
)  # fmt: skip
_SOURCES: TypeAdapter[Source] = TypeAdapter(Source)


class Prepared(NamedTuple):
    """A folder of prepared rows and how many they are."""

    folder: Path
    digest: str
    good: int
    bad: int


class TokenizerFacts(NamedTuple):
    """What preparing needs of a tokenizer: its `tokenizer.json` text and the id that ends an answer."""

    json: str
    eos: int


def prepare(sources: Sequence[Source], kind: Kind, data: Data, tokenizer: TokenizerFacts, storage: Path) -> Prepared:
    """Tokenise `sources` with Ray Data, or find the rows of an earlier run with the same content and settings.

    Raises:
        DataError: when a source is missing, holds no usable row, or more than `data.max_bad_fraction` bad ones.
    """
    key = digest(
        {
            "format": _FORMAT,
            "kind": kind,
            "content": [fingerprint(source) for source in sources],
            "mapping": [source.model_dump(mode="json") for source in sources],
            "data": data.model_dump(mode="json", include={"template", "answer_prefix", "max_tokens"}),
            "tokenizer": [digest(tokenizer.json, 64), tokenizer.eos],
        },
        32,
    )
    folder = storage / "prepared" / key
    if not (folder / "summary.json").exists():
        _write(sources, kind, data, tokenizer, folder)
    summary = json.loads((folder / "summary.json").read_text())
    prepared = Prepared(folder, key, summary["good"], summary["bad"])
    _check(prepared, summary, sources, data)
    return prepared


def read_rows(folder: Path) -> pa.Table:
    """The good rows of a prepared folder, in the order of their sources."""
    good = pa.dataset.dataset(folder / "rows", schema=_SCHEMA).to_table(filter=pa.compute.field("error").is_null())
    return good.sort_by([("source", "ascending"), ("file", "ascending"), ("line", "ascending")])


def _write(sources: Sequence[Source], kind: Kind, data: Data, tokenizer: TokenizerFacts, folder: Path) -> None:
    """Read and tokenise with Ray Data; a prepared folder is whole or absent, whoever else prepares it too."""
    import ray.data

    # Found here, on the driver, so that a missing file is told at once and without a worker's traceback.
    files = [(i, name) for i, source in enumerate(sources) for name in source_files(source)]
    with whole_folder(folder) as partial:
        (partial / "rows").mkdir()
        (partial / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        settings = {
            "sources": [source.model_dump(mode="json") for source in sources],
            "kind": kind,
            "tokenizer": str(partial / "tokenizer.json"),
            "eos": tokenizer.eos,
            "data": data.model_dump(mode="json", include={"template", "answer_prefix", "max_tokens"}),
        }
        dataset: Any = ray.data.from_items([{"source": i, "file": name} for i, name in files])
        # Different CPU shares keep Ray from fusing the two, so that one long file is read once and tokenised widely.
        dataset = dataset.map_batches(_read, batch_size=1, fn_args=(settings,), num_cpus=0.25)
        dataset = dataset.map_batches(
            _tokenise, batch_size=1024, batch_format="pyarrow", fn_args=(settings,), num_cpus=0.5
        )
        dataset.write_parquet(str(partial / "rows"))
        _write_summary(partial)


def _write_summary(folder: Path) -> None:
    rows = pa.dataset.dataset(folder / "rows", schema=_SCHEMA)
    bad = rows.to_table(columns=["file", "line", "error", "raw"], filter=pa.compute.field("error").is_valid())
    with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as stream:
        for row in bad.sort_by([("file", "ascending"), ("line", "ascending")]).to_pylist():
            reason = {"file": row["file"], "line": row["line"], "reason": row["error"], "raw": row["raw"]}
            stream.write(json.dumps(reason, ensure_ascii=False) + "\n")
    summary = {
        "good": rows.count_rows() - bad.num_rows,
        "bad": bad.num_rows,
        "reasons": dict(Counter(bad["error"].to_pylist()).most_common()),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))


def _check(prepared: Prepared, summary: dict[str, Any], sources: Sequence[Source], data: Data) -> None:
    names = ", ".join(name for source in sources for name in source_files(source))
    total = prepared.good + prepared.bad
    reasons = "; ".join(f"{count} x {reason}" for reason, count in summary["reasons"].items())
    if not total:
        raise DataError(f"Data is empty (files={names}). Expected at least one row.")
    if not prepared.good or prepared.bad / total > data.max_bad_fraction:
        raise DataError(
            f"{prepared.bad} of {total} rows are unusable (files={names}): {reasons}. Expected at most "
            f"{data.max_bad_fraction:.1%}. They are listed in {prepared.folder / 'quarantine.jsonl'}; mend them, check "
            "the prompt and answer columns, or raise data.max_bad_fraction."
        )


# --- run inside Ray Data tasks ---------------------------------------------------------------------------------------


def _read(batch: dict[str, Any], settings: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """Stream a file's records in chunks, as text that crosses processes whatever its columns are."""
    for index, file in zip(batch["source"], batch["file"], strict=True):
        source = _SOURCES.validate_python(settings["sources"][int(index)])
        chunk: list[dict[str, Any]] = []
        for record in read_records(source, str(file)):
            chunk.append({"source": int(index), "file": str(file), "record": json.dumps(record, default=str)})
            if len(chunk) == 1024:
                yield _columns(chunk)
                chunk = []
        if chunk:
            yield _columns(chunk)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


@functools.lru_cache(maxsize=4)
def _encoder(tokenizer: str, eos: int, template: str, answer_prefix: str) -> Encoder:
    return Encoder(Tokenizer.from_file(tokenizer), eos, template, answer_prefix)


def _tokenise(batch: pa.Table, settings: dict[str, Any]) -> pa.Table:
    data = settings["data"]
    encoder = _encoder(settings["tokenizer"], settings["eos"], data["template"], data["answer_prefix"])
    encode = {"pairs": _pair, "answers": _pool_answer, "questions": _question}[settings["kind"]]
    rows = []
    for item in batch.to_pylist():
        source = _SOURCES.validate_python(settings["sources"][item["source"]])
        record = Record(*json.loads(item["record"]))
        row: dict[str, Any] = {"source": item["source"], "file": item["file"], "line": record.line}
        try:
            if record.fields is None:
                raise _Unusable(record.error or "unreadable")
            row |= encode(record.fields, source, encoder, data["max_tokens"])
        except _Unusable as reason:
            raw = record.raw if record.fields is None else json.dumps(record.fields, default=str)
            row |= {"error": str(reason), "raw": raw}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


class _Unusable(Exception):
    """Reason for which one row is set aside."""


def _pair(fields: dict[str, Any], source: Source, encoder: Encoder, max_tokens: int) -> dict[str, Any]:
    prompt, answer = _text(fields, source.prompt), _text(fields, source.answer)
    head = _prompt(encoder, prompt)
    ids = head + encoder.answer(prompt, answer)
    if len(ids) > max_tokens:
        raise _Unusable(f"longer than data.max_tokens={max_tokens}")
    return {"row_id": digest([prompt, answer], 16), "input_ids": ids, "answer_start": len(head)}


def _pool_answer(fields: dict[str, Any], source: Source, encoder: Encoder, max_tokens: int) -> dict[str, Any]:
    answer = _text(fields, source.answer)
    ids = encoder.answer("", answer)
    if len(ids) > max_tokens:
        raise _Unusable(f"longer than data.max_tokens={max_tokens}")
    return {"row_id": digest(["", answer], 16), "input_ids": ids, "answer_start": 0}


def _question(fields: dict[str, Any], source: Source, encoder: Encoder, max_tokens: int) -> dict[str, Any]:
    question, answer = _text(fields, source.prompt), _text(fields, source.answer)
    answers = [answer]
    if source.paraphrased_answer:
        answers.append(_text(fields, source.paraphrased_answer))
    if source.perturbed_answer:
        wrong = fields.get(source.perturbed_answer)
        if (
            not isinstance(wrong, list)
            or not wrong
            or not all(isinstance(x, str) and x.strip() and _is_unicode(x) for x in wrong)
        ):
            raise _Unusable(f"column {source.perturbed_answer!r} is not a list of texts")
        answers += wrong
    head = _prompt(encoder, question)
    encoded = [encoder.answer(question, text) for text in answers]
    if len(head) + max(map(len, encoded)) > max_tokens:
        raise _Unusable(f"longer than data.max_tokens={max_tokens}")
    return {
        "row_id": digest([question, *answers], 16), "input_ids": head, "answer_start": len(head), "question": question,
        "answer": answer, "answers": encoded, "paraphrased": bool(source.paraphrased_answer),
    }  # fmt: skip


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a cut emoji leaves it
        return False
    return True


def _prompt(encoder: Encoder, prompt: str) -> list[int]:
    head = encoder.prompt(prompt)
    if not head:
        raise _Unusable("prompt has no tokens, so nothing predicts the answer's first")
    return head


def _text(fields: dict[str, Any], column: str) -> str:
    if column not in fields:
        raise _Unusable(f"no column {column!r} among {sorted(fields)}")
    value = fields[column]
    if not isinstance(value, str):
        raise _Unusable(f"column {column!r} is not text")
    if not _is_unicode(value):
        raise _Unusable(f"column {column!r} is not valid Unicode")
    if not value.strip():
        raise _Unusable(f"column {column!r} is empty")
    return value
