"""What the records say of a model: TOFU's metrics (arXiv 2401.06121) as plain functions.

A probability is that of a whole answer per token: exp(mean log p), EOS included.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.config import Evaluation
from components.errors import DataError


def evaluate_records(records: pa.Table, retain_only: pa.Table | None, evaluation: Evaluation) -> dict[str, float]:
    """All metrics of one model. Those that need retain-only records or a forget set are left out without them.

    Names: `<set>_probability`, `<set>_rouge`, `<set>_exact_match`, `<set>_truth_ratio`, `forget_quality`,
    `model_utility`.
    """
    metrics: dict[str, float] = {}
    by_set = _by_set(records)
    for name, rows in by_set.items():
        wrong = any(wrong_logp(row) for row in rows)
        normalised = evaluation.sets[name].normalised
        metrics[f"{name}_probability"] = _mean(
            [normalised_probability(r) if normalised else probability(r) for r in rows]
        )
        metrics[f"{name}_rouge"] = _mean([rouge_recall(row["answer"], row["generated"]) for row in rows])
        metrics[f"{name}_exact_match"] = _mean([row["generated"].strip() == row["answer"].strip() for row in rows])
        if wrong:
            logs = [log_truth_ratio(row) for row in rows]
            # On what must be forgotten a ratio of 1 tells nothing; elsewhere the smaller the better.
            scores = [math.exp(-abs(x)) if name == "forget" else max(0.0, -math.expm1(x)) for x in logs]
            metrics[f"{name}_truth_ratio"] = _mean(scores)
    if evaluation.utility:
        metrics["model_utility"] = model_utility(metrics, evaluation.utility)
    if retain_only is not None and "forget" in by_set and any(wrong_logp(row) for row in by_set["forget"]):
        metrics["forget_quality"] = forget_quality(
            [log_truth_ratio(row) for row in by_set["forget"]],
            [log_truth_ratio(row) for row in _by_set(retain_only)["forget"]],
        )
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise DataError(f"Metrics are not finite ({', '.join(bad)}). Expected finite log-probabilities in the records.")
    return metrics


def probability(row: dict[str, Any]) -> float:
    """Of the right answer."""
    return math.exp(float(np.mean(row["logp"][0])))


def wrong_logp(row: dict[str, Any]) -> list[list[float]]:
    """Log-probabilities of the wrong answers' tokens."""
    return row["logp"][2 if row["paraphrased"] else 1 :]


def normalised_probability(row: dict[str, Any]) -> float:
    """p / (p + Σ p_wrong): 1 when the right answer outweighs all wrong ones."""
    right = probability(row)
    return right / (right + sum(math.exp(float(np.mean(logp))) for logp in wrong_logp(row)))


def log_truth_ratio(row: dict[str, Any]) -> float:
    """Log of the wrong answers' geometric mean probability over the paraphrased (else the right) answer's.

    At most 700 in size, so that its exponential stays finite for a model that has collapsed.
    """
    right = float(np.mean(row["logp"][1 if row["paraphrased"] else 0]))
    return float(np.clip(np.mean([np.mean(logp) for logp in wrong_logp(row)]) - right, -700, 700))


def rouge_recall(answer: str, generated: str) -> float:
    """ROUGE-L recall with stemming."""
    return _rouge().score(answer, generated)["rougeL"].recall


def forget_quality(unlearned: Sequence[float], retain_only: Sequence[float]) -> float:
    """p of the two-sample Kolmogorov-Smirnov test on truth ratios: high when nothing tells the models apart.

    The test looks at order only, so that logs of the ratios serve as well.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(unlearned, retain_only).pvalue)


def model_utility(metrics: dict[str, float], sets: Sequence[str]) -> float:
    """Harmonic mean of probability, ROUGE-L and truth ratio over `sets`; TOFU takes three sets, hence nine numbers."""
    values = [
        metrics[f"{s}_{m}"] for s in sets for m in ("probability", "rouge", "truth_ratio") if f"{s}_{m}" in metrics
    ]
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def _by_set(records: pa.Table) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in records.to_pylist():
        rows.setdefault(row["set"], []).append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
