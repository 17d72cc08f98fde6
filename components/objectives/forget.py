"""Forget terms: make answers unlikely, or move the activations behind them.

Each returns `(sum, metrics)`: the term summed over its answer tokens or its rows, to be divided by their global count,
and sums over tokens to log. Every sign is such that the optimizer minimises.

Shapes: `logp`, `original_logp` and `mask` are [rows, longest answer]; `logits` and `original_logits` are
[answer tokens, vocabulary], `states` [answer tokens, hidden size] and `targets` [answer tokens], without padding.
Originals need no gradient. Symbols: y answer, x prompt, p = p_θ the current model, q = p_o the original one, σ the
logistic function.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from components.objectives.parts import Sum, log_softmaxes, precise, probability


def gradient_ascent(logp: Tensor, mask: Tensor) -> Sum:
    """L_fgt = −Σ_t CE(y_t | x, y_<t) = Σ_t log p(y_t): pushed down, the answer becomes unlikely (2310.10683, eq. 2)."""
    return (logp * mask).sum(), probability(logp, mask)


def bounded_ascent(logp: Tensor, mask: Tensor, bound: float) -> Sum:
    """−Σ_t min(CE(y_t), bound): gradient ascent that lets go of a token whose loss [nats] has reached `bound`."""
    return (logp.clamp(min=-bound) * mask).sum(), probability(logp, mask)


def npo(logp: Tensor, original_logp: Tensor, mask: Tensor, beta: float) -> Sum:
    """Negative preference optimization (2404.05868, eq. 3), a sum over rows:

    −(2/β) log σ(−β log(p(y|x) / q(y|x))), the log-ratio summed over the answer's tokens, not their mean.
    """
    ratio = ((logp - original_logp) * mask).sum(-1)
    return (2 / beta) * softplus(beta * ratio).sum(), probability(logp, mask)


def simnpo(logp: Tensor, mask: Tensor, beta: float, margin: float) -> Sum:
    """NPO without reference, by the answer's mean log-probability (2410.07163, eq. 4), a sum over rows:

    −(2/β) log σ(−(β/|y|) log p(y|x) − γ), with the margin γ outside the factor β as in the paper.
    """
    mean = (logp * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return (2 / beta) * softplus(beta * mean + margin).sum(), probability(logp, mask)


def wga(logp: Tensor, mask: Tensor, beta: float) -> Sum:
    """Weighted gradient ascent (2502.19301): Σ_t p(y_t)^β log p(y_t), the weight taken as a constant.

    Tokens that are unlikely already get little weight, so that the loss does not run away.
    """
    weight = (beta * logp.detach()).exp()
    return (weight * logp * mask).sum(), probability(logp, mask)


def satimp(logp: Tensor, mask: Tensor, beta1: float, beta2: float) -> Sum:
    """Saturation and importance weights (2505.11953): Σ_t p^β1 (1−p)^β2 log p, the weights taken as constants."""
    p = logp.detach().exp()
    return (p**beta1 * (1 - p).clamp(min=0) ** beta2 * logp * mask).sum(), probability(logp, mask)


def ce_u(logits: Tensor, targets: Tensor) -> Sum:
    """Cross-entropy to the model's own distribution without the answer's token (2503.01224): Σ_t H(q̃_t, p_t).

    q̃_t = softmax of the logits with that of y_t at −∞, taken as constant.
    """
    z = precise(logits)
    without = z.detach().scatter(-1, targets.unsqueeze(-1), float("-inf"))
    logp = torch.log_softmax(z, -1)
    # 0 · log p(y_t) is 0, also where the model is so sure that log p of the rest underflows
    return -(torch.softmax(without, -1) * logp).sum(), _at(logp, targets)


def undial(logits: Tensor, original_logits: Tensor, targets: Tensor, beta: float) -> Sum:
    """Self-distillation from adjusted logits (2402.10052): Σ_t H(softmax(z_o − β·onehot(y_t)), p_t)."""
    adjusted = precise(original_logits).scatter_add(
        -1, targets.unsqueeze(-1), torch.full_like(targets.unsqueeze(-1), -beta, dtype=precise(original_logits).dtype)
    )
    logp = torch.log_softmax(precise(logits), -1)
    return -(torch.softmax(adjusted, -1) * logp).sum(), _at(logp, targets)


def kl_ascent(logits: Tensor, original_logits: Tensor, targets: Tensor) -> Sum:
    """−Σ_t KL(q_t ‖ p_t): away from the original on forget answers (the KL method of SOUL's code, as a true KL).

    At the original itself the gradient is 0, so that something else must make the first step, such as a random term.
    """
    logq, logp = log_softmaxes(original_logits, logits)
    return (logq.exp() * (logp - logq)).sum(), _at(logp, targets)


def max_entropy(logits: Tensor, targets: Tensor) -> Sum:
    """Σ_t KL(p_t ‖ uniform) = Σ_t (log V − H(p_t)), V the vocabulary's size (ME, 2410.08109)."""
    logp = torch.log_softmax(precise(logits), -1)
    return (logp.exp() * (logp + math.log(logp.shape[-1]))).sum(), _at(logp, targets)


def logit_flattening(logits: Tensor, targets: Tensor) -> Sum:
    """Σ_t (max_v z_tv − mean_v z_tv)² on the logits z (PDU, 2506.05314); 0 where all are alike."""
    z = precise(logits)
    spread = z.max(-1).values - z.mean(-1) if len(z) else z.sum(-1)
    return spread.square().sum(), _at(torch.log_softmax(z.detach(), -1), targets)


def dpo(
    logp: Tensor,
    original_logp: Tensor,
    mask: Tensor,
    chosen_logp: Tensor,
    chosen_original_logp: Tensor,
    chosen_mask: Tensor,
    beta: float,
) -> Sum:
    """Direct preference of a chosen answer y_w to the forget answer y_l (2305.18290, eq. 7), a sum over rows:

    −(2/β) log σ(β log(p(y_w|x)/q(y_w|x)) − β log(p(y_l|x)/q(y_l|x))), log-ratios summed over tokens.

    The factor 2/β is NPO's (2404.05868), which is what remains without y_w: at the original the gradient is that of
    log p(y_l) − log p(y_w). DPO's paper has none: for its loss take the weight β/2. The `chosen_…` are
    [rows · K, longest chosen answer], the K chosen answers of a row one after another; their mean is the row's loss.
    """
    rejected = ((logp - original_logp) * mask).sum(-1)
    chosen = ((chosen_logp - chosen_original_logp) * chosen_mask).sum(-1)
    k = len(chosen) // max(1, len(rejected))
    margin = chosen - rejected.repeat_interleave(k)
    total = (2 / beta) / max(1, k) * softplus(-beta * margin).sum()
    return total, probability(logp, mask)


def rmu(states: Tensor, direction: Tensor, coefficient: float) -> Sum:
    """Σ_t mean_d (h_t − c·u)², h_t a layer's activation and u a random unit vector [d] (RMU, 2403.03218, eq. 1).

    The activations are those that predict the answer's tokens. The paper sums over d, its code takes the mean.
    """
    return (precise(states) - coefficient * direction).square().mean(-1).sum(), {}


def _at(logp: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Probability of the targets by [tokens, vocabulary] log-probabilities."""
    return {"token_probability": logp.detach().gather(-1, targets.unsqueeze(-1)).exp().sum()}
