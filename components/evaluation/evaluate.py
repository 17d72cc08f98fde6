"""All metrics of one model from its records, with what they are uncertain by and why some are not there."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from components.config import Evaluation
from components.errors import DataError
from components.evaluation.membership import ATTACKS, auc, privleak
from components.evaluation.metrics import (
    ROW_METRICS,
    Row,
    by_set,
    log_truth_ratios,
    normalised_probability,
    wrong_logp,
)

_RESAMPLES = 1000
_NEEDS_RETAIN_ONLY = "needs a retain-only model: give models.retain_only, finetune or evaluation.retain_log"
_UTILITY = ("probability", "rouge", "truth_ratio")


class Evaluated(NamedTuple):
    """The metrics of one model."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals over rows, for those that have one."""
    missing: dict[str, str]
    """What is not computed, and what it needs."""


class Reference(NamedTuple):
    """What metrics need of the retain-only model."""

    log_truth_ratios: list[float] | None
    """One for each forget row."""
    min_k_auc: float | None
    row_ids: list[str] | None = None
    """Of the forget rows, where the source tells."""


def reference_of(records: pa.Table) -> Reference:
    """From the retain-only model's own records."""
    sets = by_set(records)
    forget, holdout = sets.get("forget", []), sets.get("holdout", [])
    scores = [[ATTACKS["min_k"](row) for row in rows] for rows in (forget, holdout)]
    return Reference(log_truth_ratios(forget), auc(*scores) if all(scores) else None, [row["row_id"] for row in forget])


def evaluate_records(records: pa.Table, reference: Reference | None, evaluation: Evaluation) -> Evaluated:
    """`<set>_<row metric>` for each set, `forget_quality`, `model_utility`, `mia_<attack>`, `privleak`.

    Raises:
        DataError: when a metric is not finite, or the retain-only model was asked other questions.
    """
    sets = by_set(records)
    scores = {name: _row_scores(rows, evaluation.sets[name].normalised) for name, rows in sets.items()}
    draws = {name: _resamples(len(rows), name) for name, rows in sets.items()}
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    missing: dict[str, str] = {}
    for name, found in scores.items():
        for metric, numbers in found.items():
            values[f"{name}_{metric}"] = float(numbers.mean())
            intervals[f"{name}_{metric}"] = _interval(numbers[draws[name]].mean(axis=1))
    if evaluation.utility:
        parts = [(s, m) for s in evaluation.utility for m in _UTILITY if m in scores[s]]
        values["model_utility"] = float(harmonic_mean(np.array([values[f"{s}_{m}"] for s, m in parts])))
        resampled = np.stack([scores[s][m][draws[s]].mean(axis=1) for s, m in parts])
        intervals["model_utility"] = _interval(harmonic_mean(resampled))
    if "forget" in sets:
        if reference:
            _check_same_rows(sets["forget"], reference)
        _forget_quality(sets["forget"], reference, values, missing)
        _membership(sets, reference, draws, values, intervals, missing)
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DataError(f"Metrics are not finite ({', '.join(bad)}). Expected finite log-probabilities in the records.")
    return Evaluated(values, intervals, missing)


def _row_scores(rows: Sequence[Row], normalised: bool) -> dict[str, np.ndarray]:
    """[rows] numbers of each metric that the set's rows allow."""
    wrong = all(wrong_logp(row) for row in rows)
    functions: dict[str, Callable[[Row], float]] = {
        name: metric.of for name, metric in ROW_METRICS.items() if wrong or not metric.needs_wrong
    }
    if normalised:
        functions["probability"] = normalised_probability
    return {name: np.array([of(row) for row in rows]) for name, of in functions.items()}


def _check_same_rows(forget: Sequence[Row], reference: Reference) -> None:
    counts = (len(forget), len(reference.log_truth_ratios or forget))
    if reference.row_ids not in (None, [row["row_id"] for row in forget]) or counts[0] != counts[1]:
        raise DataError(
            f"The retain-only model was asked other forget questions (here={counts[0]} rows, there={counts[1]}). "
            "Expected the same ones. Score it with this recipe, or give the log of this forget set."
        )


def _forget_quality(
    forget: Sequence[Row], reference: Reference | None, values: dict[str, float], missing: dict[str, str]
) -> None:
    names = ("forget_quality", "forget_quality_log10")
    own = log_truth_ratios(forget)
    if own is None:
        missing.update(dict.fromkeys(names, "needs wrong answers in the set forget: name its column perturbed_answer"))
    elif reference is None or reference.log_truth_ratios is None:
        missing.update(dict.fromkeys(names, _NEEDS_RETAIN_ONLY))
    else:
        values["forget_quality"], values["forget_quality_log10"] = forget_quality(own, reference.log_truth_ratios)


def _membership(
    sets: Mapping[str, list[Row]], reference: Reference | None, draws: Mapping[str, np.ndarray],
    values: dict[str, float], intervals: dict[str, tuple[float, float]], missing: dict[str, str],
) -> None:  # fmt: skip
    if "holdout" not in sets:
        why = "needs rows that no model saw: give evaluation.sets.holdout"
        missing.update(dict.fromkeys([*(f"mia_{name}" for name in ATTACKS), "privleak"], why))
        return
    for name, attack in ATTACKS.items():
        members, others = (np.array([attack(row) for row in sets[s]]) for s in ("forget", "holdout"))
        values[f"mia_{name}"] = auc(members, others)
        pairs = zip(draws["forget"][:200], draws["holdout"][:200], strict=True)
        intervals[f"mia_{name}"] = _interval(np.array([auc(members[i], others[j]) for i, j in pairs]))
    if reference is None or reference.min_k_auc is None:
        missing["privleak"] = _NEEDS_RETAIN_ONLY
    elif reference.min_k_auc < 1:
        values["privleak"] = privleak(values["mia_min_k"], reference.min_k_auc)
    else:
        missing["privleak"] = "is not defined where min-k tells all rows of the retain-only model apart"


def forget_quality(unlearned: Sequence[float], retain_only: Sequence[float]) -> tuple[float, float]:
    """(p, log10 p) of the two-sample Kolmogorov-Smirnov test on truth ratios: high when nothing tells the models apart.

    The test looks at order only, so that logs of the ratios serve as well. Where p is too small for a float its
    logarithm comes from the asymptotic form, log10(2) − 2·D²·nm/(n+m)/ln 10 (TOFU, arXiv 2401.06121).
    """
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it says when it takes the asymptotic form
        found = ks_2samp(unlearned, retain_only)
    p, n, m = float(found.pvalue), len(unlearned), len(retain_only)
    if p > 1e-300:
        return p, math.log10(p)
    return p, math.log10(2) - 2 * float(found.statistic) ** 2 * n * m / (n + m) / math.log(10)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis; 0 where any value is: TOFU's model utility, of nine numbers there."""
    with np.errstate(divide="ignore"):
        return np.where((values > 0).all(axis=0), len(values) / (1 / values).sum(axis=0), 0.0)


def better(name: str) -> str:
    """`higher`, `lower`, or the value that is best: which way a metric is good."""
    if name.startswith("mia_"):
        return "0.5"
    if name == "privleak":
        return "0"
    for metric, about in ROW_METRICS.items():
        if name.endswith(f"_{metric}"):
            turned = name == f"forget_{metric}" and not about.always
            return {"higher": "lower", "lower": "higher"}[about.better] if turned else about.better
    return "higher"


def _resamples(count: int, name: str) -> np.ndarray:
    """[resamples, count] rows drawn with replacement, the same for any model."""
    seed = np.frombuffer(name.encode().ljust(8, b"-")[:8], dtype=np.uint64)[0]
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
