"""The terms of an unlearning objective as pure functions of log-probabilities.

Each returns `(sum, metrics)`: the term summed over its answer tokens or its rows, to be divided by their global count,
and sums over tokens to log. Every sign is such that the optimizer minimises.

Shapes: `logp`, `original_logp` and `mask` are [rows, longest answer]; `logits` and `original_logits` are
[answer tokens, vocabulary] and `targets` [answer tokens], without padding. Originals need no gradient.
Symbols: y answer, x prompt, p = p_θ the current model, q = p_o the original one, σ the logistic function.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

Sum = tuple[Tensor, dict[str, Tensor]]

# --- forget: lower the probability of answers -------------------------------------------------------------------------


def gradient_ascent(logp: Tensor, mask: Tensor) -> Sum:
    """L_fgt = −Σ_t CE(y_t | x, y_<t) = Σ_t log p(y_t): pushed down, the answer becomes unlikely (2310.10683, eq. 2)."""
    return (logp * mask).sum(), _probability(logp, mask)


def bounded_ascent(logp: Tensor, mask: Tensor, bound: float) -> Sum:
    """−Σ_t min(CE(y_t), bound): gradient ascent that lets go of a token whose loss [nats] has reached `bound`."""
    return (logp.clamp(min=-bound) * mask).sum(), _probability(logp, mask)


def npo(logp: Tensor, original_logp: Tensor, mask: Tensor, beta: float) -> Sum:
    """Negative preference optimization (2404.05868, eq. 3), a sum over rows:

    −(2/β) log σ(−β log(p(y|x) / q(y|x))), the log-ratio summed over the answer's tokens, not their mean.
    """
    ratio = ((logp - original_logp) * mask).sum(-1)
    return (2 / beta) * (softplus(beta * ratio) * _has_tokens(mask)).sum(), _probability(logp, mask)


def simnpo(logp: Tensor, mask: Tensor, beta: float, margin: float) -> Sum:
    """NPO without reference, by the answer's mean log-probability (2410.07163, eq. 4), a sum over rows:

    −(2/β) log σ(−(β/|y|) log p(y|x) − γ), with the margin γ outside the factor β as in the paper.
    """
    mean = (logp * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return (2 / beta) * (softplus(beta * mean + margin) * _has_tokens(mask)).sum(), _probability(logp, mask)


def wga(logp: Tensor, mask: Tensor, beta: float) -> Sum:
    """Weighted gradient ascent (2502.19301): Σ_t p(y_t)^β log p(y_t), the weight taken as a constant.

    Tokens that are unlikely already get little weight, so that the loss does not run away.
    """
    weight = (beta * logp.detach()).exp()
    return (weight * logp * mask).sum(), _probability(logp, mask)


def satimp(logp: Tensor, mask: Tensor, beta1: float, beta2: float) -> Sum:
    """Saturation and importance weights (2505.11953): Σ_t p^β1 (1−p)^β2 log p, the weights taken as constants."""
    p = logp.detach().exp()
    return (p**beta1 * (1 - p).clamp(min=0) ** beta2 * logp * mask).sum(), _probability(logp, mask)


def ce_u(logits: Tensor, targets: Tensor) -> Sum:
    """Cross-entropy to the model's own distribution without the answer's token (2503.01224): Σ_t H(q̃_t, p_t).

    q̃_t = softmax of the logits with that of y_t at −∞, taken as constant.
    """
    z = _precise(logits)
    without = z.detach().scatter(-1, targets.unsqueeze(-1), float("-inf"))
    logp = torch.log_softmax(z, -1)
    # 0 · log p(y_t) is 0, also where the model is so sure that log p of the rest underflows
    total = -(torch.softmax(without, -1) * logp).sum()
    return total, {"token_probability": logp.detach().gather(-1, targets.unsqueeze(-1)).exp().sum()}


def undial(logits: Tensor, original_logits: Tensor, targets: Tensor, beta: float) -> Sum:
    """Self-distillation from adjusted logits (2402.10052): Σ_t H(softmax(z_o − β·onehot(y_t)), p_t)."""
    adjusted = _precise(original_logits).scatter_add(
        -1, targets.unsqueeze(-1), torch.full_like(targets.unsqueeze(-1), -beta, dtype=_precise(original_logits).dtype)
    )
    logp = torch.log_softmax(_precise(logits), -1)
    total = -(torch.softmax(adjusted, -1) * logp).sum()
    return total, {"token_probability": logp.detach().gather(-1, targets.unsqueeze(-1)).exp().sum()}


# --- random and normal: raise probabilities, or keep distributions ----------------------------------------------------


def cross_entropy(logp: Tensor, mask: Tensor) -> Sum:
    """Σ_t CE(y_t | x, y_<t) = −Σ_t log p(y_t).

    As L_rdn on random responses to forget prompts (2310.10683, eq. 3), and as plain NLL on normal data.
    """
    return -(logp * mask).sum(), _probability(logp, mask)


def kl_to_original(logits: Tensor, original_logits: Tensor) -> Sum:
    """L_nor = Σ_t KL(h_original ‖ h_θ) over the answer tokens of normal data (2310.10683, eq. 4).

    Zero with zero gradient where both agree.
    """
    logq, logp = _log_softmaxes(original_logits, logits)
    return (logq.exp() * (logq - logp)).sum(), _agreement(logq, logp)


def reverse_kl(logits: Tensor, original_logits: Tensor) -> Sum:
    """Σ_t KL(h_θ ‖ h_original): forbids what the original finds unlikely, lets go of some of what it finds likely."""
    logq, logp = _log_softmaxes(original_logits, logits)
    return (logp.exp() * (logp - logq)).sum(), _agreement(logq, logp)


def jensen_shannon(logits: Tensor, original_logits: Tensor) -> Sum:
    """Σ_t ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2: symmetric, at most log 2 a token."""
    logq, logp = _log_softmaxes(original_logits, logits)
    logm = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0, dtype=logp.dtype, device=logp.device))
    total = (logp.exp() * (logp - logm) + logq.exp() * (logq - logm)).sum() / 2
    return total, _agreement(logq, logp)


def _probability(logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"token_probability": (logp.detach().exp() * mask).sum()}


def _agreement(logq: Tensor, logp: Tensor) -> dict[str, Tensor]:
    return {"agreement": (logq.argmax(-1) == logp.detach().argmax(-1)).sum()}


def _log_softmaxes(original_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log_softmax(_precise(original_logits), -1), torch.log_softmax(_precise(logits), -1)


def _precise(x: Tensor) -> Tensor:
    """At least fp32: bf16 has 3 digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _has_tokens(mask: Tensor) -> Tensor:
    """[rows] 0 for the row that stands in for none in an empty micro-batch."""
    return (mask.sum(-1) > 0).to(mask.dtype)


class Term(NamedTuple):
    """A term as the loop uses it."""

    function: Callable[..., Sum]
    inputs: tuple[str, ...]
    """The inputs it takes; its other arguments are the term's settings."""
    per: Literal["token", "row"] = "token"
    """What its sum is divided by the global count of."""


TERMS: dict[str, Term] = {
    # by the config's type
    "gradient_ascent": Term(gradient_ascent, ("logp", "mask")),
    "bounded_ascent": Term(bounded_ascent, ("logp", "mask")),
    "npo": Term(npo, ("logp", "original_logp", "mask"), per="row"),
    "simnpo": Term(simnpo, ("logp", "mask"), per="row"),
    "wga": Term(wga, ("logp", "mask")),
    "satimp": Term(satimp, ("logp", "mask")),
    "ce_u": Term(ce_u, ("logits", "targets")),
    "undial": Term(undial, ("logits", "original_logits", "targets")),
    "random_response": Term(cross_entropy, ("logp", "mask")),
    "nll": Term(cross_entropy, ("logp", "mask")),
    "kl_to_original": Term(kl_to_original, ("logits", "original_logits")),
    "reverse_kl": Term(reverse_kl, ("logits", "original_logits")),
    "jensen_shannon": Term(jensen_shannon, ("logits", "original_logits")),
}
