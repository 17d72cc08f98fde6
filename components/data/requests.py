"""Deletion requests: who asked when for which records to be forgotten, and which record is whose."""

import codecs
import functools
import hashlib
import itertools
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, field_validator

from components.config.section import Section
from components.data import contents, locations
from components.data.filters import LIST, NULL, OBJECT, TRUTH, kind, read_number
from components.data.sources import load_json
from components.errors import DataError

Scalar = str | int | float | bool
_TRUTHS = ("true", "false")


class Request(Section):
    """One line of a request file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False)

    request_id: str = Field(min_length=1)
    received: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}")
    """Date, as 2026-01-31."""
    legal_basis: str = ""
    """Such as `GDPR Art. 17(1)(b)`."""
    where: dict[str, Scalar | list[Scalar]] = Field(min_length=1)
    """Column → value, or any of several: a record is meant when all columns have theirs."""

    @field_validator("where")
    @classmethod
    def _names_something(cls, where: dict[str, Any]) -> dict[str, Any]:
        if empty := [column for column, value in where.items() if value == [] or "" in _several(value)]:
            raise ValueError(f"has no value for {', '.join(empty)}")
        return where


class RequestFile(NamedTuple):
    """What a file asks for."""

    sha256: str
    """Of its bytes."""
    requests: list[Request]


def read_requests(path: str) -> RequestFile:
    """The requests of a file of JSON lines, on this machine or in an object store.

    Raises:
        DataError: naming every line that is none, and ids that occur twice.
    """
    sha256, lines = _read(locations.find(path)[0])
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(Request.model_validate(load_json(line.decode())))
            except UnicodeDecodeError:
                problems.append(f"line {number}: not UTF-8")
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                problems.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    ids = [request.request_id for request in found]
    problems += [f"{name} occurs twice" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    if problems or not found:
        raise DataError(
            f"Deletion requests cannot be read (path={path}): {'; '.join(problems[:10]) or 'no line'}. Expected lines "
            'such as {"request_id": "R-1", "received": "2026-01-31", "legal_basis": "…", "where": {"person": "…"}}.'
        )
    return RequestFile(sha256, found)


def _read(file: str) -> tuple[str, list[bytes]]:
    """(hex digest of a file's bytes, its lines in UTF-8)."""
    with locations.open_file(file) as stream:
        digest = hashlib.sha256(stream.read()).hexdigest()
    with contents.reading(file, "JSON lines"):
        stream, raw = contents.open_text(file)
        with raw:
            return digest, stream.read().removeprefix(codecs.BOM_UTF8).splitlines()


def whose(path: str) -> Callable[[dict[str, Any]], list[str]]:
    """The ids of all requests in the file that mean a record, none for others; a ValueError where that cannot be said.

    One look at a record for each combination of columns that the requests name, however many requests there are.
    """
    return _whose(path, locations.state(locations.find(path)[0]))


@functools.lru_cache(maxsize=4)
def _whose(path: str, state: str) -> Callable[[dict[str, Any]], list[str]]:
    requests = read_requests(path).requests
    asked = _asked(requests)
    wanted: dict[tuple[str, ...], dict[tuple[str | None, ...], list[str]]] = {}
    for request in requests:
        columns = tuple(sorted(request.where))
        values = [[_key(value, asked[column]) for value in _several(request.where[column])] for column in columns]
        for combination in set(itertools.product(*values)):
            wanted.setdefault(columns, {}).setdefault(combination, []).append(request.request_id)

    def find(fields: dict[str, Any]) -> list[str]:
        keys = {column: _found(column, fields[column], asked[column]) for column in asked if column in fields}
        return [
            name
            for columns, meant in wanted.items()
            if all(column in keys for column in columns)
            for name in meant.get(tuple(keys[column] for column in columns), ())
        ]

    return find


class _Asked(NamedTuple):
    """What all requests name for one column."""

    values: set[str]
    kinds: set[str]
    numbers: set[tuple[str, int | float]]
    """What is a number, and what reads as one, each with what it is."""


def _asked(requests: list[Request]) -> dict[str, _Asked]:
    found: dict[str, _Asked] = {}
    for request in requests:
        for column, value in request.where.items():
            about = found.setdefault(column, _Asked(set(), set(), set()))
            for one in _several(value):
                about.kinds.add(kind(one))
                about.numbers.update((kind(one), read) for read in _as_number(one))
                about.values.add(_plain(one))
    return {c: about._replace(values={_key(value, about) for value in about.values}) for c, about in found.items()}


def _several(value: Scalar | list[Scalar]) -> list[Scalar]:
    return value if isinstance(value, list) else [value]


def _key(value: Any, asked: _Asked) -> str:
    """By what a value is looked up; where requests name a truth value, `True` and `TRUE` in a text are one, too."""
    plain = _plain(value)
    return plain.casefold() if TRUTH in asked.kinds and plain.casefold() in _TRUTHS else plain


def _found(column: str, value: Any, asked: _Asked) -> str | None:
    """By what a record's value is looked up among those that requests name; None for null.

    Raises:
        ValueError: where it may be one of them, stored as another type.
    """
    found = kind(value)
    if found == NULL:
        return None
    key = _key(value, asked)
    if found not in (LIST, OBJECT) and (not key or key in asked.values):
        return key
    unlike = {other for other, read in asked.numbers if other != found and read in _as_number(value)}
    if TRUTH in asked.kinds and found != TRUTH and key not in _TRUTHS:
        unlike.add(TRUTH)
    if found in (LIST, OBJECT):
        unlike = asked.kinds
    if unlike:
        named = " and ".join(sorted(unlike))
        raise ValueError(f"column {column!r} is {found} where they name {named}; name values as the data holds them")
    return key


def _as_number(value: Any) -> list[int | float]:
    """The number that a value is or reads as, if it is one."""
    read = read_number(value) if isinstance(value, str) else value if isinstance(value, int | float) else None
    return [] if read is None else [read]


def _plain(value: Any) -> str:
    """Numbers, truth values and words as a text file has them, however they are stored."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value)).strip()
