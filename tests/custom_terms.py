"""Terms as a user would bring them."""

from typing import Any

from torch import Tensor


def ascent(logp: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, dict[str, Any]]:
    return (scale * logp * mask).sum(), {"token_probability": (logp.detach().exp() * mask).sum()}


def two_originals(original_logp: Tensor, original_logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return original_logp.sum() + original_logits.sum(), {}
