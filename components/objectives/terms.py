"""The terms of an unlearning objective as pure functions of log-probabilities.

Each returns `(sum, metrics)`: the term summed over its answer tokens, to be divided by their global count, and sums to
log, divided by the same count. Every sign is such that the optimizer minimises.

Shapes: `logp` and `mask` are [rows, longest answer]; `*_logits` are [answer tokens, vocabulary] without padding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Term = tuple[Tensor, dict[str, Tensor]]


def gradient_ascent(logp: Tensor, mask: Tensor) -> Term:
    """L_fgt = −Σ_t CE(y_t | x, y_<t) = Σ_t log p(y_t): pushed down, the answer becomes unlikely (2310.10683, eq. 2)."""
    return (logp * mask).sum(), {"token_probability": (logp.detach().exp() * mask).sum()}


def cross_entropy(logp: Tensor, mask: Tensor) -> Term:
    """Σ_t CE(y_t | x, y_<t) = −Σ_t log p(y_t).

    As L_rdn on random responses to forget prompts (2310.10683, eq. 3), and as plain NLL on normal data.
    """
    return -(logp * mask).sum(), {"token_probability": (logp.detach().exp() * mask).sum()}


def kl_to_original(logits: Tensor, original_logits: Tensor) -> Term:
    """L_nor = Σ_t KL(h_original ‖ h_θ) over the answer tokens of normal data (2310.10683, eq. 4).

    Zero with zero gradient where both agree. `original_logits` need no gradient.
    """
    logq = torch.log_softmax(original_logits.float(), dim=-1)
    logp = torch.log_softmax(logits.float(), dim=-1)
    agreement = (logq.argmax(-1) == logp.detach().argmax(-1)).sum()
    return (logq.exp() * (logq - logp)).sum(), {"agreement": agreement}


TERMS: dict[str, tuple[Callable[..., Term], tuple[str, ...]]] = {
    # config type: (function, the inputs it takes)
    "gradient_ascent": (gradient_ascent, ("logp", "mask")),
    "random_response": (cross_entropy, ("logp", "mask")),
    "nll": (cross_entropy, ("logp", "mask")),
    "kl_to_original": (kl_to_original, ("logits", "original_logits")),
}
