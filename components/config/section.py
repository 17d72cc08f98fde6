"""What all sections of the recipe are made of."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


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
