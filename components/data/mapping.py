"""One record → the texts that a row is made of, by the source's columns, templates and filter."""

import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from components.config import FixedAnswers, PoolSource, Text
from components.data import filters
from components.data.requests import Undecided, whose
from components.data.sources import Record, load_json, read_records, source_files

Message = dict[str, str]
"""A chat message: role and content."""
Prompt = str | list[Message]

_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Unusable(Exception):
    """The reason for which one row is set aside."""

    requests: Sequence[str] = ()
    """The deletion requests that may mean it, where that cannot be decided."""


class Example(NamedTuple):
    """The texts of one row."""

    prompt: Prompt
    answers: list[str]
    """The answer; for a question also its paraphrase and the wrong answers, in this order."""


def parse(record: Record) -> dict[str, Any]:
    """The record's columns.

    Raises:
        Unusable: when it is not a JSON object in UTF-8, or names a key twice.
    """
    if record.error:
        raise Unusable(record.error)
    try:
        fields = load_json(record.data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except ValueError as error:
        raise Unusable(str(error)) from None
    if not isinstance(fields, dict):
        raise Unusable("not a JSON object")
    return fields


def raw_text(record: Record) -> str:
    """The record as text, for the quarantine: bytes that are not UTF-8 stand as \\xNN."""
    return record.data.decode("utf-8", errors="backslashreplace")


def requests_of(source: PoolSource) -> Callable[[dict[str, Any]], list[str]]:
    """The deletion requests that mean a record, of those that the source is chosen by or without.

    What is returned raises Unusable for a record of which that cannot be said.
    """
    path = None if isinstance(source, Text | FixedAnswers) else source.requested or source.not_requested
    if not path:
        return lambda fields: []
    find = whose(path)

    def asked(fields: dict[str, Any]) -> list[str]:
        try:
            return find(fields)
        except Undecided as error:
            unusable = Unusable(f"deletion requests cannot be decided: {error}")
            unusable.requests = error.requests
            raise unusable from None

    return asked


def record_filter(source: PoolSource) -> Callable[[dict[str, Any]], bool]:
    """Whether `source.where` holds for a record; raises Unusable when that cannot be said."""
    if isinstance(source, Text | FixedAnswers) or source.where is None:
        return lambda fields: True
    decide = filters.compiled(source.where)

    def holds(fields: dict[str, Any]) -> bool:
        try:
            return decide(fields)
        except ValueError as error:
            raise Unusable(f"where cannot be decided: {error}") from None

    return holds


def examples(fields: dict[str, Any], source: PoolSource, kind: str) -> list[Example]:
    """The rows that one record makes: one for each of its answers.

    Raises:
        Unusable: when a column is missing, empty or not text.
    """
    if isinstance(source, Text):
        return [Example("", [_text(fields, "text").replace("\r\n", "\n").replace("\r", "\n")])]
    if isinstance(source, FixedAnswers):
        return [Example("", [_text(fields, "text")])]
    if source.dialogue:
        prompt, answer = _dialogue(fields, source.dialogue, source.turns)
        return [Example(prompt, [answer])]
    prompt = "" if kind == "answers" else _prompt(fields, source.prompt)
    if source.choices:
        prompt, answers = _choices(prompt, fields, source)
        return [Example(prompt, answers if kind == "questions" else answers[:1])]
    prompt, right = _completed(prompt, fields, source)
    others = _others(fields, source) if kind == "questions" else []
    return [Example(prompt, [answer, *others]) for answer in right]


def row_texts(source: PoolSource) -> Iterator[list[str]]:
    """Prompt and answers of each usable row that the source takes, such as to train a tokenizer on."""
    for fields in taken_records(source):
        with suppress(Unusable):
            for example in examples(fields, source, "pairs"):
                yield [shown(example.prompt), *example.answers]


def taken_records(source: PoolSource) -> Iterator[dict[str, Any]]:
    """The columns of each readable record that the source takes: by its filter and its deletion requests."""
    holds, requests_for = record_filter(source), requests_of(source)
    left_out = bool(getattr(source, "not_requested", None))
    filtered = left_out or bool(getattr(source, "requested", None))
    for file in source_files(source):
        for record in read_records(source, file):
            with suppress(Unusable):
                fields = parse(record)
                if holds(fields) and not (filtered and bool(requests_for(fields)) == left_out):
                    yield fields


def levelled(text: str) -> str:
    """The text with letter case and spaces levelled, as rows are compared by."""
    return " ".join(text.casefold().split())


def shown(prompt: Prompt) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt if m["content"])


def _completed(prompt: Prompt, fields: dict[str, Any], source: Any) -> tuple[Prompt, list[str]]:
    """(prompt, answers); a completion of several turns has all but the last one in the prompt."""
    value = None if _is_template(fields, source.answer) else _field(fields, source.answer)
    if _are_messages(value):
        messages = _messages(value, source.answer)
        if {messages[0]["role"], messages[-1]["role"]} != {"assistant"}:
            raise Unusable(
                f"column {source.answer!r} does not begin and end with an answer; name a whole conversation as dialogue"
            )
        *more, last = messages
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*asked, *more] if more else prompt, [last["content"]]
    texts = [_text(fields, source.answer)] if value is None else _texts(value, source.answer)
    if source.split_answers:
        texts = [part.strip() for text in texts for part in text.split(source.split_answers) if part.strip()]
        if not texts:
            raise Unusable(f"column {source.answer!r} holds no answer")
    return prompt, [_checked(text, source.answer) for text in texts]


def _others(fields: dict[str, Any], source: Any) -> list[str]:
    """The right answer in other words, and the wrong ones."""
    answers = [_text(fields, source.paraphrased_answer)] if source.paraphrased_answer else []
    if source.perturbed_answer:
        answers += _texts(_field(fields, source.perturbed_answer), source.perturbed_answer)
    return answers


def _choices(prompt: Prompt, fields: dict[str, Any], source: Any) -> tuple[Prompt, list[str]]:
    """(prompt, right option and then the wrong ones)."""
    options, right = _field(fields, source.choices), _field(fields, source.answer)
    if not isinstance(options, list) or len(options) < 2:
        raise Unusable(f"column {source.choices!r} is not a list of texts")
    options = _texts(options, source.choices)
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise Unusable(f"column {source.answer!r} is not the number of one of {len(options)} options, from 0")
    if source.letters:
        if not isinstance(prompt, str):
            raise Unusable("options cannot be written under a list of messages")
        letters = string.ascii_uppercase[: len(options)]
        if len(letters) < len(options):
            raise Unusable(f"{len(options)} options are more than there are letters")
        prompt = "\n".join([prompt, *(f"{letter}. {text}" for letter, text in zip(letters, options, strict=True))])
        options = list(letters)
    return prompt, [options[right], *(text for i, text in enumerate(options) if i != right)]


def _prompt(fields: dict[str, Any], column: str) -> Prompt:
    value = None if _is_template(fields, column) else _field(fields, column)
    return _messages(value, column) if isinstance(value, list) and not _are_parts(value) else _text(fields, column)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and _keys(m) for m in value)


def _keys(message: dict[str, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _MESSAGE_KEYS if message.keys() >= set(keys)), None)


def _messages(value: Any, column: str) -> list[Message]:
    if not _are_messages(value):
        raise Unusable(f"column {column!r} is not a list of messages with role and content, or from and value")
    return [_message(message, *(_keys(message) or ())) for message in value]


def _message(message: dict[str, Any], role_key: str, content_key: str) -> Message:
    role = _text(message, role_key)
    role = _ROLES.get(role, role)
    content = _part(message[content_key], content_key) if role == "system" else _text(message, content_key)
    return {"role": role, "content": content}


def _dialogue(fields: dict[str, Any], column: str, turns: tuple[str, str]) -> tuple[Prompt, str]:
    value = None if _is_template(fields, column) else _field(fields, column)
    if isinstance(value, list):
        messages = _messages(value, column)
    else:
        parts = re.split(f"({re.escape(turns[0])}|{re.escape(turns[1])})", _text(fields, column))
        if parts[0].strip() or len(parts) < 3:
            raise Unusable(f"column {column!r} does not begin with a turn")
        roles = ["user" if mark == turns[0] else "assistant" for mark in parts[1::2]]
        turns_said = [_checked(said.strip(), f"{column}, turn {i}") for i, said in enumerate(parts[2::2], start=1)]
        messages = [{"role": role, "content": said} for role, said in zip(roles, turns_said, strict=True)]
    *before, last = messages
    if last["role"] != "assistant" or not before:
        raise Unusable(f"column {column!r} does not end with an answer to something")
    return before, _checked(last["content"], column)


def _is_template(fields: dict[str, Any], column: str) -> bool:
    return "{" in column and column not in fields


def _text(fields: dict[str, Any], column: str) -> str:
    """A column's text, or that of a template with columns in braces, not all of them empty."""
    if not _is_template(fields, column):
        return _checked(_said(_field(fields, column), column), column)
    parts = [(literal, name) for literal, name, *_ in string.Formatter().parse(column)]
    said = {name: _part(_field(fields, name), name) for _, name in parts if name is not None}
    text = "".join(literal + (said[name] if name is not None else "") for literal, name in parts)
    if all(said.values()):
        return _checked(text, column)
    if not any(said.values()):
        raise Unusable(" and ".join(f"column {name!r} is empty" for name in said))
    return text.strip()  # without the line ends that set an empty part apart


def _part(value: Any, column: str) -> str:
    """A text that may be empty."""
    text = "" if value is None else _said(value, column)
    return _checked(text, column) if text.strip() else ""


def _field(fields: dict[str, Any], column: str) -> Any:
    """A column's value; a dotted name reaches into structs, and into those of a list."""
    if column in fields:
        return fields[column]
    value: Any = fields
    for name in column.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and all(isinstance(item, dict) and name in item for item in value):
            value = [item[name] for item in value]
        elif value is None:  # a struct that this row lacks
            return None
        else:
            raise Unusable(f"no column {column!r} among {sorted(fields)}")
    return value


def _texts(value: Any, column: str) -> list[str]:
    """The texts of a column that holds one or a list of them."""
    if not isinstance(value, list) or _are_parts(value) or _are_messages(value):
        return [_checked(_said(value, column), column)]
    if not value:
        raise Unusable(f"column {column!r} is not a list of texts")
    return [_checked(_said(item, column), column) for item in value]


def _said(value: Any, column: str) -> str:
    """A value as text: a number as Python writes it, a message's content in parts joined, an answer's message."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if _are_parts(value):
        other = sorted({str(part["type"]) for part in value if not isinstance(part.get("text"), str)})
        if other:
            raise Unusable(f"column {column!r} has a part of type {other[0]!r}, which is not text")
        return "".join(part["text"] for part in value)
    if _are_messages(value) and len(value) == 1:
        [message] = _messages(value, column)
        if message["role"] == "assistant":
            return message["content"]
    raise Unusable(f"column {column!r} is not text")


def _are_parts(value: Any) -> bool:
    """Whether it is a message's content in parts, such as `[{"type": "text", "text": "Hi"}]`."""
    return isinstance(value, list) and bool(value) and all(isinstance(p, dict) and _is_part(p) for p in value)


def _is_part(value: dict[str, Any]) -> bool:
    return "type" in value and not _keys(value)


def _checked(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a cut emoji leaves it, or a byte that is not UTF-8
        raise Unusable(f"column {column!r} is not valid Unicode") from None
    if not text.strip():
        raise Unusable(f"column {column!r} is empty")
    return text
