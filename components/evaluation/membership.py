"""Can the forget rows be told from rows that the model never saw? Attacks as functions of a record, and their AUC.

Every score is higher for what looks unseen, so that an AUC of 1 says that the forget rows are remembered, 0.5 that
nothing tells them apart, and 0 that they stand out by being too unlikely: all but 0.5 gives them away.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from components.evaluation.metrics import Row, mean_logp, without_eos

_SHARE = 0.4  # of the tokens, the least likely, that min-k looks at


def loss(row: Row) -> float:
    """Mean −log p (arXiv 1709.01604)."""
    return -mean_logp(row["logp"][0])


def loss_over_zlib(row: Row) -> float:
    """Mean −log p over the compressed length of the answer in bytes (arXiv 2012.07805)."""
    return loss(row) / len(zlib.compress(row["answer"].encode()))


def min_k(row: Row) -> float:
    """Minus the mean of the 40 % lowest log p (arXiv 2310.16789)."""
    return -_lowest(without_eos(row["logp"][0]))


def min_k_plus_plus(row: Row) -> float:
    """The same of (log p − μ)/σ, with mean and deviation of log p over the vocabulary (arXiv 2404.02936)."""
    logp, mean, variance = (np.array(without_eos(values)) for values in (row["logp"][0], row["mean"], row["variance"]))
    return -_lowest((logp - mean) / np.sqrt(np.maximum(variance, 1e-6)))


def loss_over_reference(row: Row) -> float:
    """Mean −log p less the same of a model that saw neither forget nor holdout rows (arXiv 2012.07805)."""
    return loss(row) - row["reference_loss"]


def gradient_norm(row: Row) -> float:
    """L2 norm of the gradient of the mean −log p, averaged over the parameter tensors (arXiv 2402.17012)."""
    return row["gradient_norm"]


class Attack(NamedTuple):
    """A score for each row."""

    of: Callable[[Row], float]
    needs: str = ""
    """Column that the records must have."""


ATTACKS: dict[str, Attack] = {
    "loss": Attack(loss),
    "zlib": Attack(loss_over_zlib),
    "min_k": Attack(min_k),
    "min_k_plus_plus": Attack(min_k_plus_plus),
    "reference": Attack(loss_over_reference, "reference_loss"),
    "gradient_norm": Attack(gradient_norm, "gradient_norm"),
}


def auc(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    """Probability that one of `others` scores higher than one of `members`, ties counting half."""
    from scipy.stats import rankdata

    ranks = rankdata([*members, *others])
    m, n = len(members), len(others)
    return float((ranks[m:].sum() - n * (n + 1) / 2) / (m * n))


def privleak(unlearned: float, retain_only: float) -> float:
    """100·(s − r)/r with s, r = 1 − AUC of min-k for the unlearned and the retain-only model (MUSE, arXiv 2407.06460).

    0 is best; below it too little is forgotten, above it so much that it shows.
    """
    return 100 * (retain_only - unlearned) / (1 - retain_only) if retain_only < 1 else math.inf


def _lowest(values: Sequence[float] | np.ndarray) -> float:
    return float(np.sort(np.asarray(values))[: max(1, int(_SHARE * len(values)))].mean())
