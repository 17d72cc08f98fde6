"""Random and normal terms: raise probabilities, or keep distributions and activations. Shapes as in `forget.py`."""

import torch
from torch import Tensor

from components.objectives.parts import Sum, agreement, log_softmaxes, precise, probability


def cross_entropy(logp: Tensor, mask: Tensor) -> Sum:
    """Σ_t CE(y_t | x, y_<t) = −Σ_t log p(y_t).

    As L_rdn on random responses to forget prompts (2310.10683, eq. 3), and as plain NLL on normal data.
    """
    return -(logp * mask).sum(), probability(logp, mask)


def kl_to_original(logits: Tensor, original_logits: Tensor) -> Sum:
    """L_nor = Σ_t KL(h_original ‖ h_θ) over the answer tokens of normal data (2310.10683, eq. 4).

    Zero with zero gradient where both agree.
    """
    logq, logp = log_softmaxes(original_logits, logits)
    return (logq.exp() * (logq - logp)).sum(), agreement(logq, logp)


def reverse_kl(logits: Tensor, original_logits: Tensor) -> Sum:
    """Σ_t KL(h_θ ‖ h_original): forbids what the original finds unlikely, lets go of some of what it finds likely."""
    logq, logp = log_softmaxes(original_logits, logits)
    return (logp.exp() * (logp - logq)).sum(), agreement(logq, logp)


def jensen_shannon(logits: Tensor, original_logits: Tensor) -> Sum:
    """Σ_t ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2: symmetric, at most log 2 a token."""
    logq, logp = log_softmaxes(original_logits, logits)
    logm = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0, dtype=logp.dtype, device=logp.device))
    total = (logp.exp() * (logp - logm) + logq.exp() * (logq - logm)).sum() / 2
    return total, agreement(logq, logp)


def embedding_difference(states: Tensor, original_states: Tensor) -> Sum:
    """Σ_t mean_d (h_t − h_o,t)²: activations of a layer stay where the original has them (RMU, 2403.03218, eq. 2)."""
    return (precise(states) - precise(original_states)).square().mean(-1).sum(), {}
