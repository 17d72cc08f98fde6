"""Optimizer settings → a torch optimizer."""

import math
from typing import Any

import torch
from torch import nn

from components.config import Adafactor, AdamW, Influence, Lion, Optimizer, Sgd, Train
from components.optimizers import influence, soul


def make_optimizer(config: Optimizer, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """The optimizer of a run of `steps` steps over the parameters that are trained.

    Weight decay applies to matrices only: norms and biases keep their scale.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(config, Influence):
        return influence.Influence(parameters, config.lr, config.damping, steps)
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (others, 0.0))
        if params
    ]
    match config:
        case AdamW():
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        case Sgd():
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        case Adafactor():
            return torch.optim.Adafactor(groups, lr=config.lr)
        case Lion():
            from pytorch_optimizer import Lion as TheirLion

            return TheirLion(groups, lr=config.lr, betas=config.betas)
        case _:
            return soul.Soul(
                groups, lr=config.lr, betas=config.betas, gamma=config.gamma, eps=config.eps,
                release=config.preset == "soul-release",
            )  # fmt: skip


def learning_rate(base: float, train: Train, step: int, steps: int) -> float:
    """Rate for `step` (from 0) of `steps`: linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    if step < train.warmup_steps:
        return base * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    return base * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
