"""SOUL: second-order unlearning with Sophia's clipped step and a diagonal Hessian (arXiv 2404.18239, 2305.14342)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from components.config import Soul as SoulConfig


class Soul(torch.optim.Optimizer):
    """θ ← θ(1−ηλ) − η·clip(m / max(γh, ε), 1) with m ← β1·m + (1−β1)·g, elementwise: it works on ZeRO's flat pieces.

    `refresh` and `refresh_with_square` renew h; parameters, m and step counts stay as they are. With `release`, the
    published code's arithmetic: both averages of m within a step (β1² in place of β1) and γh + ε for max(γh, ε).

    h lives in `exp_avg_sq` and m in `exp_avg`, both updated in place, since ZeRO keeps views of them. ZeRO may call
    `step` once per sub-group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float = 0.0,
        release: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})
        self.release = release
        self.own_square: float | None = None
        """B where the next `step` shall first refresh h with its own gradient, as clipped; else None."""
        self._clipped: list[Tensor] = []
        self._size = 0

    def init_state(self, p: Tensor) -> dict[str, Any]:
        """The state of `p`, made when there is none."""
        return momentum_and_curvature(self.state[p], p)

    def refresh(self, p: Tensor) -> None:
        """h ← β2·h + (1−β2)·ĥ with the estimate ĥ in `p.grad`."""
        assert p.grad is not None
        self._average(p).add_(p.grad, alpha=1 - self._beta2())

    def refresh_with_square(self, p: Tensor, factor: float) -> None:
        """h ← β2·h + (1−β2)·B·g⊙g with g in `p.grad` and the factor B."""
        assert p.grad is not None
        self._average(p).addcmul_(p.grad, p.grad, value=(1 - self._beta2()) * factor)

    def _average(self, p: Tensor) -> Tensor:
        return self.init_state(p)["exp_avg_sq"].mul_(self._beta2())

    def _beta2(self) -> float:
        return self.param_groups[0]["betas"][1]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1 = group["betas"][0] ** 2 if self.release else group["betas"][0]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.init_state(p)
                m, h = state["exp_avg"], state["exp_avg_sq"]
                state["step"] += 1
                if self.own_square is not None:
                    self.refresh_with_square(p, self.own_square)
                if group["weight_decay"]:
                    p.data.mul_(1 - group["lr"] * group["weight_decay"])
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                scale = group["gamma"] * h
                scale = scale.add_(group["eps"]) if self.release else scale.clamp_min_(group["eps"])
                direction = torch.div(m, scale, out=scale)  # pieces are large: no second copy
                self._clipped.append((direction >= 1).sum() + (direction <= -1).sum())
                self._size += p.numel()
                p.data.add_(direction.clamp_(-1, 1), alpha=-group["lr"])

    def take_clip_counts(self) -> tuple[int, int]:
        """(clipped, all) coordinates on this rank since the last call; ZeRO's padding counts as not clipped."""
        counts = int(sum(int(c) for c in self._clipped)), self._size
        self._clipped, self._size = [], 0
        return counts


def momentum_and_curvature(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """`state` with a step count, m and h for the parameter `p`, made when they are missing."""
    if "exp_avg" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(p.data)
        state["exp_avg_sq"] = torch.zeros_like(p.data)
    return state


def refresh_due(config: SoulConfig, since: int | None, clip_fraction: float | None) -> bool:
    """Whether to refresh the Hessian before a step: `since` steps after the last refresh, None when there was none.

    `clip_fraction` is that of the step before. It leaves the band upwards when h has become too small for the
    gradients, and downwards when it has become too large.
    """
    if since is None or since >= config.hessian_interval:
        return True
    band = config.adaptive
    if band is None or clip_fraction is None or since < band.soonest:
        return False
    return not band.low <= clip_fraction <= band.high
