"""Deletion requests: who asked when for which records to be forgotten, and which record is whose."""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

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


def read_requests(path: str) -> list[Request]:
    """The requests of a file of JSON lines, on this machine or in an object store.

    Raises:
        DataError: naming every line that is none, and ids that occur twice.
    """
    [file] = locations.find(path)[:1]
    with locations.open_file(file) as stream:
        lines = stream.read().decode("utf-8").splitlines()
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(Request.model_validate(json.loads(line)))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                problems.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            except ValueError as error:
                problems.append(f"line {number}: not JSON: {error}")
    ids = [request.request_id for request in found]
    problems += [f"{name} occurs twice" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    if problems or not found:
        raise DataError(
            f"Deletion requests cannot be read (path={path}): {'; '.join(problems[:10]) or 'no line'}. Expected lines "
            'such as {"request_id": "R-1", "received": "2026-01-31", "legal_basis": "…", "where": {"person": "…"}}.'
        )
    return found


def whose(path: str) -> Callable[[dict[str, Any]], str | None]:
    """The id of the first request in the file that means a record, None where none does.

    One look at a record for each combination of columns that the requests name, however many requests there are.
    """
    return _whose(path, locations.state(locations.find(path)[0]))


@functools.lru_cache(maxsize=4)
def _whose(path: str, state: str) -> Callable[[dict[str, Any]], str | None]:
    wanted: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for request in read_requests(path):
        columns = tuple(sorted(request.where))
        values = [v if isinstance(v, list) else [v] for v in (request.where[column] for column in columns)]
        for combination in itertools.product(*values):
            wanted.setdefault(columns, {}).setdefault(tuple(map(_plain, combination)), request.request_id)

    def find(fields: dict[str, Any]) -> str | None:
        for columns, meant in wanted.items():
            if all(column in fields for column in columns):
                found = meant.get(tuple(_plain(fields[column]) for column in columns))
                if found is not None:
                    return found
        return None

    return find


def _plain(value: Any) -> str:
    """Numbers and words alike, as a CSV file has them."""
    return str(value).strip()
