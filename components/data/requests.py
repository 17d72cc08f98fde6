"""Deletion requests: who asked when for which records to be forgotten, and which record is whose."""

import functools
import hashlib
import itertools
import json
import math
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, field_validator

from components.config.section import Section
from components.data import locations
from components.errors import DataError

Scalar = str | int | float | bool


class Request(Section):
    """One line of a request file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

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
        if empty := [column for column, value in where.items() if value in ([], "")]:
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
    with locations.open_file(locations.find(path)[0]) as stream:
        content = stream.read()
    found, problems = [], []
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            try:
                found.append(Request.model_validate(json.loads(line)))
                if (count := _combinations(found[-1])) > _MOST:
                    problems.append(f"line {number}: where: stands for {count:,} combinations; expected {_MOST:,}")
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                problems.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: not JSON: {error}")
    ids = [request.request_id for request in found]
    problems += [f"{name} occurs twice" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    if problems or not found:
        raise DataError(
            f"Deletion requests cannot be read (path={path}): {'; '.join(problems[:10]) or 'no line'}. Expected lines "
            'such as {"request_id": "R-1", "received": "2026-01-31", "legal_basis": "…", "where": {"person": "…"}}.'
        )
    return RequestFile(hashlib.sha256(content).hexdigest(), found)


_MOST = 100_000
"""Combinations of values that a request may stand for; each is looked up for by itself."""


def _combinations(request: Request) -> int:
    return math.prod(len(value) if isinstance(value, list) else 1 for value in request.where.values())


def whose(path: str) -> Callable[[dict[str, Any]], list[str]]:
    """The ids of all requests in the file that mean a record, none for others.

    One look at a record for each combination of columns that the requests name, however many requests there are.
    """
    return _whose(path, locations.state(locations.find(path)[0]))


@functools.lru_cache(maxsize=4)
def _whose(path: str, state: str) -> Callable[[dict[str, Any]], list[str]]:
    wanted: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
    for request in read_requests(path).requests:
        columns = tuple(sorted(request.where))
        values = [v if isinstance(v, list) else [v] for v in (request.where[column] for column in columns)]
        for combination in {tuple(map(_plain, found)) for found in itertools.product(*values)}:
            wanted.setdefault(columns, {}).setdefault(combination, []).append(request.request_id)

    def find(fields: dict[str, Any]) -> list[str]:
        return [
            name
            for columns, meant in wanted.items()
            if all(column in fields for column in columns)
            for name in meant.get(tuple(_plain(fields[column]) for column in columns), ())
        ]

    return find


def _plain(value: Any) -> str:
    """Numbers, truth values and words as a text file has them, however they are stored."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value)).strip()
