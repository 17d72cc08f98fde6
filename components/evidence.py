"""What an evaluation found of some models, written down so that it can be judged later and elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.console import utc
from components.files import write_whole

WITHOUT_INTERVAL = ("forget_quality", "forget_quality_log10", "privleak")
"""Metrics of all rows together."""


class Evaluated(NamedTuple):
    """The metrics of one model."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals over rows, for those that have one."""
    missing: dict[str, str]
    """What is not computed, and what it needs."""
    resampled: dict[str, np.ndarray]
    """What the intervals are of: the metric on rows drawn with replacement, the same draws for every model."""


class Evidence(NamedTuple):
    """The metrics of some models on the same questions."""

    questions: dict[str, str]
    """Digest of each prepared question set: other questions have another."""
    models: dict[str, str]
    """Fingerprint of each model, by the name it has in `evaluated`."""
    evaluated: dict[str, Evaluated]


def evidence_files(suite: str | None) -> tuple[str, str]:
    """Names of the two files that hold a suite's evidence; None: that of the recipe's own evaluation."""
    stem = f"metrics-{suite}" if suite else "metrics"
    return f"{stem}.json", f"{stem}.npz"


def write_evidence(evidence: Evidence, folder: Path, suite: str | None = None) -> list[Path]:
    """Write values, intervals and what is missing as JSON, and beside it the resampled numbers. Returns both files."""
    text, arrays = (folder / name for name in evidence_files(suite))
    models = {
        name: {
            "fingerprint": evidence.models[name], "values": found.values, "intervals": found.intervals,
            "missing": found.missing,
        }
        for name, found in evidence.evaluated.items()
    }  # fmt: skip
    partial = arrays.with_name(f"partial-{arrays.name}")
    numbers = {
        f"{name}/{metric}": drawn.astype(np.float64)
        for name, found in evidence.evaluated.items()
        for metric, drawn in found.resampled.items()
    }
    np.savez_compressed(partial, **numbers)  # type: ignore[arg-type]
    partial.replace(arrays)
    write_whole(text, json.dumps({"made": utc(), "questions": evidence.questions, "models": models}, indent=2))
    return [text, arrays]


def read_evidence(folder: Path, suite: str | None = None) -> Evidence | None:
    """What `write_evidence` wrote, None where it wrote nothing."""
    text, arrays = (folder / name for name in evidence_files(suite))
    if not text.exists():
        return None
    found = json.loads(text.read_text(encoding="utf-8"))
    drawn: dict[str, dict[str, np.ndarray]] = {name: {} for name in found["models"]}
    if arrays.exists():
        with np.load(arrays, allow_pickle=False) as numbers:
            for key in numbers.files:
                name, _, metric = key.partition("/")
                drawn[name][metric] = numbers[key]
    evaluated = {
        name: Evaluated(about["values"], _pairs(about["intervals"]), about["missing"], drawn[name])
        for name, about in found["models"].items()
    }
    return Evidence(found["questions"], {n: about["fingerprint"] for n, about in found["models"].items()}, evaluated)


def _pairs(intervals: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (low, high) for name, (low, high) in intervals.items()}
