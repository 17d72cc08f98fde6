"""Terms as a user would bring them."""

from typing import Any

from torch import Tensor


def ascent(logp: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, dict[str, Any]]:
    return (scale * logp * mask).sum(), {"token_probability": (logp.detach().exp() * mask).sum()}


def greedy(logp: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, dict[str, Any]]:
    return (logp * mask / temperature).sum(), {}
