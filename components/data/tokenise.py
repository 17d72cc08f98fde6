"""Records → validated, tokenised rows in files: what runs inside Ray Data's tasks.

A chunk of records becomes one file of rows, named after its place in the sources, so that a task that is run twice
writes the same file again, and the order of rows follows from the names.
"""

import functools
import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from components.config import Data, FixedAnswers, PoolSource, Text
from components.data.mapping import (
    Example,
    Prompt,
    Unusable,
    examples,
    levelled,
    parse,
    raw_text,
    record_filter,
    requests_of,
    shown,
)
from components.data.prompts import Encoder, TokenizerFacts, Tokens
from components.data.sources import Record, open_records
from components.files import write_arrow, write_whole
from components.process import keep_private

_CHUNK_RECORDS, _CHUNK_BYTES = 1 << 14, 1 << 24
_AT_ONCE = 512  # records whose encodings, some hundred bytes a token, lie in memory together
_IDS = pa.list_(pa.int32())
ROWS = pa.schema(
    {
        "row_id": pa.string(), "match": pa.uint64(), "line": pa.int64(), "input_ids": _IDS, "answer_start": pa.int32(),
        "question": pa.string(), "answer": pa.string(), "answers": pa.list_(_IDS), "paraphrased": pa.bool_(),
        "requests": pa.list_(pa.string()),
    }
)  # fmt: skip
"""`row_id` is the hash of prompt and answer, `match` the same with letter case and spaces levelled; `requests` are
the ids of the deletion requests that chose the row."""
_SOURCE: TypeAdapter[PoolSource] = TypeAdapter(PoolSource)


def read_chunks(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """Each file's records in chunks, a row for each; the last one of a file is marked, and may be empty."""
    keep_private()
    for place, setting, file in zip(batch["place"], batch["source"], batch["file"], strict=True):
        reading = open_records(_SOURCE.validate_json(str(setting)), str(file))
        chunk: list[Record] = []
        number = size = 0
        for record in reading.records:
            if chunk and (len(chunk) == _CHUNK_RECORDS or size >= _CHUNK_BYTES):
                yield _as_table(str(place), number, str(setting), str(file), chunk, reading.fraction(), last=False)
                chunk, number, size = [], number + 1, 0
            chunk.append(record)
            size += len(record.data)
        yield _as_table(str(place), number, str(setting), str(file), chunk, 1.0, last=True)


def tokenise_chunk(batch: pa.Table, folder: str) -> pa.Table:
    """Write the rows and the set-aside rows of each chunk under `folder`; returns what `prepare` sums up."""
    keep_private()
    gc.disable()  # millions of token ids, none in a cycle: walking them would take a tenth of the time
    try:
        return pa.Table.from_pylist([_tokenise(chunk, Path(folder)) for chunk in batch.to_pylist()])
    finally:
        gc.enable()


def _as_table(
    place: str, number: int, source: str, file: str, chunk: list[Record], fraction: float | None, *, last: bool
) -> pa.Table:
    row = {
        "name": f"{place}-{number:06d}", "place": place, "source": source, "file": file, "last": last,
        "fraction": -1.0 if fraction is None else fraction,
        "lines": [r.line for r in chunk], "data": [r.data for r in chunk], "errors": [r.error for r in chunk],
    }  # fmt: skip
    types = {"lines": pa.list_(pa.int64()), "data": pa.large_list(pa.large_binary()), "errors": pa.list_(pa.string())}
    return pa.table({key: pa.array([value], types.get(key)) for key, value in row.items()})


def _tokenise(chunk: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = _settings(folder / "settings.json")
    source = _SOURCE.validate_json(chunk["source"])
    records = [Record(*item) for item in zip(chunk["lines"], chunk["data"], chunk["errors"], strict=True)]
    tables, aside = [], []
    filtered = 0
    meant: Counter[str] = Counter()
    for first in range(0, len(records), _AT_ONCE):
        rows, bad, skipped, asked = _rows(
            records[first : first + _AT_ONCE], source, settings["kind"], settings["data"], folder
        )
        meant += asked
        tables.append(pa.Table.from_pylist(rows, schema=ROWS))
        aside += bad
        filtered += skipped
    table = pa.concat_tables(tables) if tables else ROWS.empty_table()
    if len(table):
        write_arrow(table, folder / "rows" / f"{chunk['name']}.arrow")
    if aside:
        lines = [json.dumps({"file": chunk["file"], **row}, ensure_ascii=False) + "\n" for row in aside]
        write_whole(folder / "quarantine" / f"{chunk['name']}.jsonl", "".join(lines))
    lengths = pa.compute.list_value_length(table["input_ids"])
    answers = pa.compute.subtract(lengths, table["answer_start"])
    return {
        "name": chunk["name"], "place": chunk["place"], "last": chunk["last"], "fraction": chunk["fraction"],
        "good": len(table), "bad": len(aside), "filtered": filtered,
        "reasons": json.dumps(Counter(row["reason"] for row in aside)),
        "requests": json.dumps(meant),
        "requests_set_aside": json.dumps(Counter(name for row in aside for name in row.get("requests", ()))),
        "tokens": pa.compute.sum(lengths).as_py() or 0,
        "longest_prompt": pa.compute.max(table["answer_start"]).as_py() or 0,
        "longest_answer": pa.compute.max(answers).as_py() or 0,
    }  # fmt: skip


@functools.lru_cache(maxsize=4)
def _settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=2)
def _encoder(folder: Path) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray runs as many tasks as there are CPUs; each is one thread
    settings = _settings(folder / "settings.json")
    return Encoder(TokenizerFacts(**settings["tokenizer"]), settings["data"])


def _rows(
    records: list[Record], source: PoolSource, kind: str, data: dict[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int, Counter[str]]:
    """Good rows, rows set aside, how many records the filter left out, and how many each deletion request means."""
    encoder = _encoder(folder)
    holds, requests_for = record_filter(source), requests_of(source)
    chosen, left_out = (getattr(source, key, None) for key in ("requested", "not_requested"))
    rows: list[dict[str, Any]] = []
    aside: list[dict[str, Any]] = []
    found: list[tuple[Record, Example]] = []
    requests: dict[int, list[str]] = {}
    meant: Counter[str] = Counter()
    filtered = 0
    for record in records:
        try:
            fields = parse(record)
            asked = requests_for(fields)
            kept = holds(fields)
            meant.update(asked if kept else ())
            if kept and not (asked and left_out) and (asked or not chosen):
                requests[record.line] = asked
                found += [(record, example) for example in examples(fields, source, kind)]
            else:
                filtered += 1
        except Unusable as reason:
            aside.append(_aside(record, reason, requests.get(record.line)))
    pairs: list[tuple[Record, Example, Tokens | Unusable]]
    if isinstance(source, Text):
        pairs = []
        for record, example in found:
            try:
                pairs += [(record, example, window) for window in _windows(encoder, example, source)]
            except Unusable as reason:
                aside.append(_aside(record, reason, None))
    else:
        # A pool's answer follows any question.
        prompts: list[Prompt] = ["?" if kind == "answers" else example.prompt for _, example in found]
        encoded = encoder.encode(prompts, [e.answers for _, e in found])
        pairs = [(record, e, tokens) for (record, e), tokens in zip(found, encoded, strict=True)]
    for record, example, tokens in pairs:
        try:
            if isinstance(tokens, Unusable):
                raise tokens
            row = _row(example, tokens, source, kind, data, encoder)
            rows.append({"line": record.line, "requests": requests[record.line], **row})
        except Unusable as reason:
            aside.append(_aside(record, reason, requests[record.line]))
    return rows, aside, filtered, meant


def _aside(record: Record, reason: Unusable, requests: list[str] | None) -> dict[str, Any]:
    row = {"line": record.line, "reason": str(reason), "raw": raw_text(record)}
    named = requests or list(reason.requests)
    return {**row, "requests": named} if named else row


def _windows(encoder: Encoder, example: Example, source: Text) -> list[Tokens]:
    windows = encoder.windows(example.answers[0], source.prefix_tokens, source.continuation_tokens, source.overlap)
    if not windows:
        raise Unusable("text too short for a prefix and a continuation")
    return windows


def _row(
    example: Example, tokens: Tokens, source: PoolSource, kind: str, data: dict[str, Any], encoder: Encoder
) -> dict[str, Any]:
    prompt = [] if kind == "answers" else tokens.prompt
    if kind != "answers" and not prompt:
        raise Unusable("prompt has no tokens, so nothing predicts the answer's first")
    if isinstance(source, Text):  # the tokens are the row: the text was cut between them
        example = Example(encoder.decode(tokens.prompt), [encoder.decode(tokens.answers[0])])
    answers = [_fitted(answer, data["max_tokens"] - len(prompt), data) for answer in tokens.answers]
    if kind == "questions":
        return {
            **_hashes(example.prompt, example.answers), "input_ids": prompt, "answer_start": len(prompt),
            "question": shown(example.prompt), "answer": example.answers[0], "answers": answers,
            "paraphrased": not isinstance(source, Text | FixedAnswers) and bool(source.paraphrased_answer),
        }  # fmt: skip
    hashes = _hashes("" if kind == "answers" else example.prompt, example.answers)
    return {**hashes, "input_ids": prompt + answers[0], "answer_start": len(prompt)}


def _fitted(answer: list[int], room: int, data: dict[str, Any]) -> list[int]:
    if len(answer) <= room:
        return answer
    if data["on_long"] == "quarantine":
        raise Unusable(f"longer than data.max_tokens={data['max_tokens']}")
    if room < 1:
        raise Unusable(f"prompt leaves no room for an answer in data.max_tokens={data['max_tokens']}")
    return answer[:room]


def _hashes(prompt: Prompt, answers: list[str]) -> dict[str, Any]:
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m for m in prompt if m["content"]]
    if [message["role"] for message in said] == ["user"]:
        asked = [said[0]["content"]]
    else:
        asked = [text for message in said for text in (message["role"], message["content"])]
    texts = [*asked, *answers]
    return {"row_id": _hash(texts).hex(), "match": int.from_bytes(_hash([levelled(text) for text in texts]))}


def _hash(texts: list[str]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()


def data_settings(data: Data) -> dict[str, Any]:
    """The settings that decide what the rows are."""
    keys = {"template", "answer_prefix", "system", "chat_variables", "max_tokens", "on_long"}
    return data.model_dump(mode="json", include=keys)
