"""All metrics of one model from its records, with what they are uncertain by and why some are not there."""

import fnmatch
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.config import Evaluation
from components.errors import DataError
from components.evaluation.membership import ATTACKS, auc, min_k, privleak
from components.evaluation.metrics import (
    GENERATED,
    NEEDS,
    ROW_METRICS,
    WRONG,
    Row,
    by_set,
    has,
    log_truth_ratios,
    normalised_probability,
)
from components.evidence import Evaluated

_RESAMPLES = 1000
_NEEDS_RETAIN_ONLY = "needs a retain-only model: give models.retain_only, finetune or evaluation.retain_log"
_UTILITY = ("probability", "rouge", "truth_ratio")
_OF_FORGET = ("forget_quality", "forget_quality_log10")
_SIGNIFICANT = 0.05  # below it the test tells two models apart (TOFU)


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
    scores = [[min_k(row) for row in rows] for rows in (forget, holdout)]
    return Reference(log_truth_ratios(forget), auc(*scores) if all(scores) else None, [row["row_id"] for row in forget])


def evaluate_records(
    records: pa.Table, reference: Reference | None, evaluation: Evaluation, others: Mapping[str, float] | None = None
) -> Evaluated:
    """`<set>_<row metric>` and `<set>_perplexity` for each set, `forget_quality`, `model_utility`, `mia_<attack>`,
    `privleak` and `others`: those that `evaluation.metrics` names, as far as the records allow.

    A set that a model answers with what is no number is not measured; `missing` says so.

    Raises:
        DataError: when the retain-only model was asked other questions.
    """
    sets = by_set(records)
    unsound = {name: why for name, rows in sets.items() if (why := _unsound(rows))}
    sets = {name: rows for name, rows in sets.items() if name not in unsound}
    draws = {name: _resamples(len(rows), name) for name, rows in sets.items()}
    found = Evaluated(dict(others or {}), {}, {}, {})
    scores = {name: _row_scores(name, rows, evaluation, found) for name, rows in sets.items()}
    for name, rows in sets.items():
        for metric, numbers in scores[name].items():
            _put(found, f"{name}_{metric}", numbers.mean(), numbers[draws[name]].mean(axis=1))
        _put(found, f"{name}_perplexity", *_perplexity(rows, draws[name]))
    for name, why in unsound.items():
        found.missing.update(dict.fromkeys(_measured(name, evaluation), why))
    if evaluation.utility and evaluation.wants("model_utility") and not unsound.keys() & {*evaluation.utility}:
        parts = [(s, m) for s in evaluation.utility for m in _UTILITY if m in scores[s]]
        whole = harmonic_mean(np.array([found.values[f"{s}_{m}"] for s, m in parts]))
        resampled = np.stack([scores[s][m][draws[s]].mean(axis=1) for s, m in parts])
        _put(found, "model_utility", whole, harmonic_mean(resampled))
    if "forget" in sets:
        if reference:
            _check_same_rows(sets["forget"], reference)
        _forget_quality(sets["forget"], reference, found)
        if "holdout" not in unsound:
            _membership(sets, reference, draws, found)
    for name in [name for name, value in found.values.items() if not math.isfinite(value)]:
        found.missing[name] = f"is {found.values.pop(name)}"
        found.intervals.pop(name, None)
        found.resampled.pop(name, None)
    return _chosen(found, evaluation)


def _unsound(rows: Sequence[Row]) -> str:
    """Why a set cannot be measured; empty where it can."""
    if not rows:
        return "has no rows"
    bad = sum(bool(np.isnan(np.concatenate(row["logp"])).any()) for row in rows)
    return f"the model's log-probabilities are no numbers in {bad} of {len(rows)} rows" if bad else ""


def _measured(name: str, evaluation: Evaluation) -> list[str]:
    """Metrics that the question set `name` has a part in."""
    own = [f"{name}_{metric}" for metric in (*ROW_METRICS, "perplexity")]
    own += ["model_utility"] * (name in evaluation.utility)
    own += [*_OF_FORGET] * (name == "forget")
    own += [*(f"mia_{attack}" for attack in ATTACKS), "privleak"] * (name in ("forget", "holdout"))
    return [metric for metric in own if evaluation.wants(metric)]


def compared(ours: Evaluated, theirs: Evaluated) -> dict[str, tuple[float, float, float]]:
    """Our metric minus theirs with the 95 % interval of that difference, row by row on the same draws."""
    differences = {}
    for name, ours_drawn in ours.resampled.items():
        if len(theirs.resampled.get(name, ())) == len(ours_drawn):
            low, high = _interval(ours_drawn - theirs.resampled[name])
            differences[name] = (ours.values[name] - theirs.values[name], low, high)
    return differences


def reads_answers(evaluation: Evaluation) -> bool:
    """Whether any metric that is wanted reads generated answers."""
    if evaluation.utility and evaluation.wants("model_utility"):
        return True
    reading = [name for name, about in ROW_METRICS.items() if about.needs not in ("", WRONG)]
    return any(evaluation.wants(f"{set_name}_{metric}") for set_name in evaluation.sets for metric in reading)


def _put(found: Evaluated, name: str, value: Any, resampled: np.ndarray) -> None:
    found.values[name], found.intervals[name] = float(value), _interval(resampled)
    found.resampled[name] = resampled


def _row_scores(name: str, rows: Sequence[Row], evaluation: Evaluation, found: Evaluated) -> dict[str, np.ndarray]:
    """[rows] numbers of each metric that is wanted and that the set's rows allow."""
    scores = {}
    in_utility = name in evaluation.utility and evaluation.wants("model_utility")
    for metric, about in ROW_METRICS.items():
        if not evaluation.wants(f"{name}_{metric}") and not (in_utility and metric in _UTILITY):
            continue
        if has(rows, about.needs):
            of = normalised_probability if metric == "probability" and evaluation.sets[name].normalised else about.of
            scores[metric] = np.array([of(row) for row in rows])
        elif evaluation.metrics is not None:
            found.missing[f"{name}_{metric}"] = NEEDS[about.needs]
        elif about.needs not in (WRONG, GENERATED):
            found.missing[metric] = NEEDS[about.needs]
    return scores


def _perplexity(rows: Sequence[Row], draws: np.ndarray) -> tuple[float, np.ndarray]:
    """exp of the mean −log p over all tokens of the right answers, EOS included; at most e^700."""
    losses, tokens = (np.array([of(row["logp"][0]) for row in rows]) for of in (lambda logp: -sum(logp), len))
    means = losses[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    return math.exp(min(losses.sum() / tokens.sum(), 700)), np.exp(np.minimum(means, 700))


def _chosen(found: Evaluated, evaluation: Evaluation) -> Evaluated:
    """Only what `evaluation.metrics` names; a pattern that names nothing is said to be missing."""

    def named(about: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in about.items() if evaluation.wants(name)}

    chosen = Evaluated(*(named(about) for about in found))
    for pattern in evaluation.metrics or []:
        if not fnmatch.filter([*chosen.values, *chosen.missing], pattern):
            chosen.missing[pattern] = "names no metric of these sets"
    return chosen


def _check_same_rows(forget: Sequence[Row], reference: Reference) -> None:
    counts = (len(forget), len(reference.log_truth_ratios or forget))
    if reference.row_ids not in (None, [row["row_id"] for row in forget]) or counts[0] != counts[1]:
        raise DataError(
            f"The retain-only model was asked other forget questions (here={counts[0]} rows, there={counts[1]}). "
            "Expected the same ones. Score it with this recipe, or give the log of this forget set."
        )


def _forget_quality(forget: Sequence[Row], reference: Reference | None, found: Evaluated) -> None:
    own = log_truth_ratios(forget)
    if own is None:
        found.missing.update(dict.fromkeys(_OF_FORGET, NEEDS[WRONG]))
    elif reference is None or reference.log_truth_ratios is None:
        found.missing.update(dict.fromkeys(_OF_FORGET, _NEEDS_RETAIN_ONLY))
    elif (least := _least_quality(len(own))) > _SIGNIFICANT:
        why = f"is at least {least:.2g} whatever the model says: {len(own)} forget rows are too few, give 4 or more"
        found.missing.update(dict.fromkeys(_OF_FORGET, why))
    else:
        found.values.update(zip(_OF_FORGET, forget_quality(own, reference.log_truth_ratios), strict=True))


def _least_quality(rows: int) -> float:
    """The smallest p-value that two samples of `rows` can have: 2/C(2n, n), where all of one lie below the other."""
    return min(1.0, 2 / math.comb(2 * rows, rows))


def _membership(
    sets: Mapping[str, list[Row]], reference: Reference | None, draws: Mapping[str, np.ndarray], found: Evaluated
) -> None:
    if "holdout" not in sets:
        why = "needs rows that no model saw: give evaluation.sets.holdout"
        found.missing.update(dict.fromkeys([*(f"mia_{name}" for name in ATTACKS), "privleak"], why))
        return
    both = [sets[name] for name in ("forget", "holdout")]
    pairs = list(zip(draws["forget"][:200], draws["holdout"][:200], strict=True))
    for name, attack in ATTACKS.items():
        if not all(has(rows, attack.needs) for rows in both):
            found.missing[f"mia_{name}"] = NEEDS[attack.needs]
            continue
        members, others = (np.array([attack.of(row) for row in rows]) for rows in both)
        resampled = np.array([auc(members[i], others[j]) for i, j in pairs])
        _put(found, f"mia_{name}", auc(members, others), resampled)
    if reference is None or reference.min_k_auc is None:
        found.missing["privleak"] = _NEEDS_RETAIN_ONLY
    elif reference.min_k_auc < 1:
        found.values["privleak"] = privleak(found.values["mia_min_k"], reference.min_k_auc)
    else:
        found.missing["privleak"] = "is not defined where min-k tells all rows of the retain-only model apart"


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
    with np.errstate(divide="ignore", over="ignore"):
        return np.where((values > 0).all(axis=0), len(values) / (1 / values).sum(axis=0), 0.0)


def better(name: str) -> str:
    """`higher`, `lower`, the value that is best, or nothing for others' metrics: which way a metric is good."""
    if name.startswith("mia_"):
        return "0.5"
    if name == "privleak":
        return "0"
    if name.endswith("_perplexity"):
        return "higher" if name == "forget_perplexity" else "lower"
    if name.startswith("lm_eval_"):
        return ""
    for metric, about in sorted(ROW_METRICS.items(), key=lambda item: -len(item[0])):
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
