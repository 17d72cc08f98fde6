"""One record → the texts that a row is made of, by the source's columns, templates and filter."""

import json
import re
import string
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from simpleeval import EvalWithCompoundTypes

from components.config import FixedAnswers, PoolSource, Text
from components.data.requests import whose
from components.data.sources import Record, read_records, source_files

Message = dict[str, str]
"""A chat message: role and content."""
Prompt = str | list[Message]


class Unusable(Exception):
    """The reason for which one row is set aside."""


class Example(NamedTuple):
    """The texts of one row."""

    prompt: Prompt
    answers: list[str]
    """The answer; for a question also its paraphrase and the wrong answers, in this order."""


def parse(record: Record) -> dict[str, Any]:
    """The record's columns.

    Raises:
        Unusable: when it is not a JSON object in UTF-8.
    """
    if record.error:
        raise Unusable(record.error)
    try:
        fields = json.loads(record.data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Unusable(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise Unusable(f"not JSON: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise Unusable("not a JSON object")
    return fields


def raw_text(record: Record) -> str:
    """The record as text, for the quarantine: bytes that are not UTF-8 stand as \\xNN."""
    return record.data.decode("utf-8", errors="backslashreplace")


def requests_of(source: PoolSource) -> Callable[[dict[str, Any]], list[str]]:
    """The deletion requests that mean a record, of those that the source is chosen by or without."""
    path = None if isinstance(source, Text | FixedAnswers) else source.requested or source.not_requested
    return whose(path) if path else lambda fields: []


def record_filter(source: PoolSource) -> Callable[[dict[str, Any]], bool]:
    """Whether `source.where` holds for a record; raises Unusable when that cannot be said."""
    if isinstance(source, Text | FixedAnswers) or source.where is None:
        return lambda fields: True
    evaluator = EvalWithCompoundTypes(functions={"len": len, "lower": str.lower})
    parsed = evaluator.parse(source.where.strip())
    constants = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}

    def holds(fields: dict[str, Any]) -> bool:
        evaluator.names = {**fields, "row": fields, **constants}
        try:
            return bool(evaluator.eval(source.where, previously_parsed=parsed))
        except Exception as error:  # any operator may refuse its operands
            raise Unusable(f"where cannot be decided: {str(error)[:100]}") from None

    return holds


def examples(fields: dict[str, Any], source: PoolSource, kind: str) -> list[Example]:
    """The rows that one record makes: one for each of its answers.

    Raises:
        Unusable: when a column is missing, empty or not text.
    """
    if isinstance(source, Text | FixedAnswers):
        return [Example("", [_text(fields, "text")])]
    if source.dialogue:
        prompt, answer = _dialogue(fields, source.dialogue, source.turns)
        return [Example(prompt, [answer])]
    prompt = "" if kind == "answers" else _prompt(fields, source.prompt)
    if source.choices:
        prompt, answers = _choices(prompt, fields, source)
        return [Example(prompt, answers if kind == "questions" else answers[:1])]
    if kind == "questions":
        return [Example(prompt, _candidates(fields, source))]
    return [Example(prompt, [answer]) for answer in _answers(fields, source)]


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
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _answers(fields: dict[str, Any], source: Any) -> list[str]:
    value = fields.get(source.answer)
    if isinstance(value, list):
        if not value or not all(isinstance(text, str) for text in value):
            raise Unusable(f"column {source.answer!r} is not a list of texts")
        texts = value
    else:
        texts = [_text(fields, source.answer)]
    if source.split_answers:
        texts = [part.strip() for text in texts for part in text.split(source.split_answers) if part.strip()]
        if not texts:
            raise Unusable(f"column {source.answer!r} holds no answer")
    return [_checked(text, source.answer) for text in texts]


def _candidates(fields: dict[str, Any], source: Any) -> list[str]:
    answers = [_text(fields, source.answer)]
    if source.paraphrased_answer:
        answers.append(_text(fields, source.paraphrased_answer))
    if source.perturbed_answer:
        wrong = fields.get(source.perturbed_answer)
        wrong = [wrong] if isinstance(wrong, str) else wrong
        if not isinstance(wrong, list) or not wrong or not all(isinstance(text, str) for text in wrong):
            raise Unusable(f"column {source.perturbed_answer!r} is not a list of texts")
        answers += [_checked(text, source.perturbed_answer) for text in wrong]
    return answers


def _choices(prompt: Prompt, fields: dict[str, Any], source: Any) -> tuple[Prompt, list[str]]:
    """(prompt, right option and then the wrong ones)."""
    options, right = fields.get(source.choices), fields.get(source.answer)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(text, str) for text in options):
        raise Unusable(f"column {source.choices!r} is not a list of texts")
    if not isinstance(right, int) or not 0 <= right < len(options):
        raise Unusable(f"column {source.answer!r} is not the number of one of {len(options)} options, from 0")
    options = [_checked(text, source.choices) for text in options]
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
    value = fields.get(column)
    return _messages(value, column) if isinstance(value, list) else _text(fields, column)


def _messages(value: list[Any], column: str) -> list[Message]:
    if not value or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise Unusable(f"column {column!r} is not a list of messages with role and content")
    return [{"role": _text(m, "role"), "content": _text(m, "content")} for m in value]


def _dialogue(fields: dict[str, Any], column: str, turns: tuple[str, str]) -> tuple[Prompt, str]:
    value = fields.get(column)
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


def _text(fields: dict[str, Any], column: str) -> str:
    """A column's text, or that of a template with columns in braces."""
    if "{" in column and column not in fields:
        parts = string.Formatter().parse(column)
        return "".join(literal + ("" if name is None else _text(fields, name)) for literal, name, *_ in parts)
    if column not in fields:
        raise Unusable(f"no column {column!r} among {sorted(fields)}")
    value = fields[column]
    if not isinstance(value, str):
        raise Unusable(f"column {column!r} is not text")
    return _checked(value, column)


def _checked(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a cut emoji leaves it, or a byte that is not UTF-8
        raise Unusable(f"column {column!r} is not valid Unicode") from None
    if not text.strip():
        raise Unusable(f"column {column!r} is empty")
    return text
