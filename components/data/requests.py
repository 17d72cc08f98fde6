"""Deletion requests: who asked when for which records to be forgotten, and which record is whose."""

import codecs
import functools
import hashlib
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, field_validator

from components.config.section import Section
from components.data import contents, locations
from components.data.filters import LIST, NULL, NUMBER, OBJECT, TRUTH, kind, read_number
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
                if (count := _combinations(found[-1])) > _MOST:
                    problems.append(f"line {number}: where: stands for {count:,} combinations; expected {_MOST:,}")
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


_MOST = 100_000
"""Combinations of values that a request may stand for; each is looked up for by itself."""


def _combinations(request: Request) -> int:
    return math.prod(len(value) if isinstance(value, list) else 1 for value in request.where.values())


def whose(path: str) -> Callable[[dict[str, Any]], list[str]]:
    """The ids of all requests in the file that mean a record, none for others; raises Undecided for some.

    One look at a record for each combination of columns that the requests name, however many requests there are.
    """
    return _whose(path, locations.state(locations.find(path)[0]))


class Undecided(ValueError):
    """A record may be the one that requests mean, but its values are of another type than theirs."""

    def __init__(self, told: str, requests: list[str]):
        super().__init__(told)
        self.requests = requests


@functools.lru_cache(maxsize=4)
def _whose(path: str, state: str) -> Callable[[dict[str, Any]], list[str]]:
    requests = {request.request_id: request.where for request in read_requests(path).requests}
    asked = _asked(requests)
    wanted: dict[tuple[str, ...], dict[tuple[str | None, ...], list[str]]] = {}
    for name, where in requests.items():
        columns = tuple(sorted(where))
        keys = [{_key(value, asked[column]) for value in _several(where[column])} for column in columns]
        for combination in itertools.product(*keys):
            wanted.setdefault(columns, {}).setdefault(combination, []).append(name)

    def find(fields: dict[str, Any]) -> list[str]:
        keys = {column: _key(fields[column], asked[column]) for column in asked if column in fields}
        found = [
            name
            for columns, meant in wanted.items()
            if all(column in keys for column in columns)
            for name in meant.get(tuple(keys[column] for column in columns), ())
        ]
        doubts = {column: ids for column in keys if (ids := _doubted(fields[column], keys[column], asked[column]))}
        for column, ids in doubts.items():
            maybe = [name for name in ids if name not in found and _may_mean(name, requests[name], keys, doubts, asked)]
            if maybe:
                of = " and ".join(sorted({kind(value) for name in maybe for value in _several(requests[name][column])}))
                raise Undecided(
                    f"column {column!r} is {kind(fields[column])} where requests name {of}; write their values as the "
                    "data stores them",
                    maybe,
                )
        return found

    return find


class _Asked(NamedTuple):
    """Which requests name what for one column."""

    values: dict[str, list[str]]
    """By what is looked up."""
    numbers: dict[int | float, list[tuple[str, str]]]
    """By number: what it stands as (text, a number), and the request."""
    truths: list[str]
    """Requests that name a truth value."""


def _asked(requests: dict[str, dict[str, Any]]) -> dict[str, _Asked]:
    found: dict[str, _Asked] = {}
    every = [
        (name, column, one) for name, where in requests.items() for column in where for one in _several(where[column])
    ]
    for name, column, value in every:
        about = found.setdefault(column, _Asked({}, {}, []))
        if kind(value) == TRUTH:
            about.truths.append(name)
        for number in _as_number(value):
            about.numbers.setdefault(number, []).append((kind(value), name))
    for name, column, value in every:
        found[column].values.setdefault(str(_key(value, found[column])), []).append(name)
    return found


def _several(value: Scalar | list[Scalar]) -> list[Scalar]:
    return value if isinstance(value, list) else [value]


def _key(value: Any, asked: _Asked) -> str | None:
    """By what a value is looked up, None for null; where a truth value is named, TRUE in a text is one, too."""
    if kind(value) in (NULL, LIST, OBJECT):
        return None
    plain = _plain(value)
    return plain.casefold() if asked.truths and plain.casefold() in _TRUTHS else plain


def _doubted(value: Any, key: str | None, asked: _Asked) -> set[str]:
    """The requests that may mean a value which is stored as something else than they name."""
    found = kind(value)
    if found in (LIST, OBJECT):
        return {name for inner in _scalars(value) for name in asked.values.get(str(_key(inner, asked)), ())}
    names = {name for number in _as_number(value) for other, name in asked.numbers.get(number, ()) if other != found}
    if found not in (NULL, TRUTH) and key not in ("", *_TRUTHS):
        names.update(asked.truths)
    return names - set(asked.values.get(key or "", ()))


def _may_mean(
    name: str, where: dict[str, Any], keys: dict[str, str | None], doubts: dict[str, set[str]], asked: dict[str, _Asked]
) -> bool:
    """Whether each of a request's columns has its value, or may have it."""
    return all(
        column in keys and (name in doubts.get(column, ()) or name in asked[column].values.get(keys[column] or "", ()))
        for column in where
    )


def _scalars(value: Any) -> Iterator[Any]:
    """What stands in a list or an object, however deep."""
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, list | dict):
            yield from _scalars(inner)
        else:
            yield inner


def _as_number(value: Any) -> list[int | float]:
    """The number that a value is or reads as, if it is one."""
    read = read_number(value) if isinstance(value, str) else value if kind(value) in (NUMBER, TRUTH) else None
    return [] if read is None else [read]


def _plain(value: Any) -> str:
    """Numbers, truth values and words as a text file has them, however they are stored."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value)).strip()
