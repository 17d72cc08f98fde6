"""What an evaluation found of some models, written down so that it can be judged later and elsewhere."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.console import utc
from components.files import write_whole

WITHOUT_INTERVAL = ("forget_quality", "forget_quality_log10", "privleak")
"""Metrics of all rows together."""


_SHARES = (
    "forget_quality", "model_utility", "probability", "rouge", "truth_ratio", "choice", "exact_match",
    "exact_memorization", "extraction_strength", "longest_run", "bleu", "leak", "worst_sample", "unique_words",
    "refusal", "harmful", "similarity",
)  # fmt: skip


def attainable(metric: str) -> tuple[float, float]:
    """The smallest and largest value that a metric can have for any model, as far as they are known."""
    name = metric.rpartition("/")[2]  # of an attack
    if name == "forget_quality_log10":
        return -math.inf, 0.0
    if name.endswith("_perplexity"):
        return 1.0, math.inf
    if name == "privleak":
        return -100.0, math.inf
    share = name.startswith("mia_") or any(name == known or name.endswith(f"_{known}") for known in _SHARES)
    return (0.0, 1.0) if share and not name.startswith("lm_eval_") else (-math.inf, math.inf)


def tells_forgetting(metric: str) -> bool:
    """Whether a metric says how much was forgotten, so that the original must be bad at it."""
    name = metric.rpartition("/")[2]
    fluent = name.endswith("_unique_words")
    return (name.startswith(("forget_", "mia_")) and not fluent) or name == "privleak"


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
