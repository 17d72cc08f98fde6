"""What several terms are made of."""

import torch
from torch import Tensor

Sum = tuple[Tensor, dict[str, Tensor]]


def probability(logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What to log of answers: the sum of their tokens' probabilities."""
    return {"token_probability": (logp.detach().exp() * mask).sum()}


def agreement(logq: Tensor, logp: Tensor) -> dict[str, Tensor]:
    """What to log of distributions: at how many tokens both find the same one most likely."""
    return {"agreement": (logq.argmax(-1) == logp.detach().argmax(-1)).sum()}


def log_softmaxes(original_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p) in at least fp32."""
    return torch.log_softmax(precise(original_logits), -1), torch.log_softmax(precise(logits), -1)


def precise(x: Tensor) -> Tensor:
    """At least fp32: bf16 has 3 digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
