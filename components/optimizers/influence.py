"""One-shot influence unlearning: the static, Hessian-preconditioned update that SOUL iterates (arXiv 2404.18239)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from components.optimizers.soul import momentum_and_curvature


class Influence(torch.optim.Optimizer):
    """θ ← θ − η·g/(h + damping) at the last of `steps` steps; g and h are averages over all of them, at the same θ.

    The influence function of removing rows is H⁻¹·∇L at the original's parameters; h is H's diagonal.
    """

    def __init__(self, params: Iterable[Any], lr: float, damping: float, steps: int):
        super().__init__(params, {"lr": lr})
        self.damping = damping
        self.steps = steps

    def init_state(self, p: Tensor) -> dict[str, Any]:
        """The state of `p`, made when there is none."""
        return momentum_and_curvature(self.state[p], p)

    def refresh_with_square(self, p: Tensor, factor: float) -> None:
        """Add a share of B·g⊙g, with g in `p.grad` and the factor B, to h."""
        self.init_state(p)["exp_avg_sq"].addcmul_(p.grad, p.grad, value=factor / self.steps)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.init_state(p)
                state["step"] += 1
                state["exp_avg"].add_(p.grad, alpha=1 / self.steps)
                if state["step"] == self.steps:
                    p.data.sub_(group["lr"] * state["exp_avg"] / (state["exp_avg_sq"] + self.damping))
