"""What all sections of the recipe are made of."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from components.urls import secrets_in

LONGEST_NAME = 255
"""Bytes of a file's or folder's name that file systems take (NAME_MAX); a whole path may have 4,095 (PATH_MAX)."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change, no secret stands in a URL."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        """A resolved recipe is stored with each run, and shown."""
        if any(secrets_in(text) for text in _texts(value)):
            raise ValueError(
                "is a URL with a user, password, token or unknown query, which would stand in config.json and logs: "
                "set it in the environment instead"
            )
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _possible(places: Any) -> Any:
    """Raise for a path that no file system takes; parts of a glob and URLs of stores have other limits."""
    for place in [places] if isinstance(places, str) else places:
        if "\0" in place:
            raise ValueError("has a NUL character, which no path can have")
        if "://" in place:
            continue
        for part in place.split("/"):
            size = len(part.encode())
            if size > LONGEST_NAME and not any(character in part for character in "*?["):
                raise ValueError(
                    f"has a name of {size} bytes ({part[:20]}…); a file system takes at most {LONGEST_NAME}"
                )
        if len(place.encode()) > 4095:
            raise ValueError(f"has {len(place.encode()):,} bytes; a file system takes paths of at most 4,095")
    return places


Place = Annotated[str, AfterValidator(_possible)]
"""A path, glob, URL or hub id."""
Places = Annotated[str | list[str], AfterValidator(_possible)]
"""One or several."""


def digest(value: object, length: int = 12) -> str:
    """First hex digits of the sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def leaves(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted paths."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= leaves(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return found


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`<dotted path>: <value> then, <value> now` for each that is not the same in both."""
    before, after = leaves(then), leaves(now)
    return [
        f"{key}: {before.get(key)} then, {after.get(key)} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
