"""SOUL: second-order unlearning with Sophia's clipped step and a diagonal Hessian (arXiv 2404.18239, 2305.14342)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor


class Soul(torch.optim.Optimizer):
    """θ ← θ(1−ηλ) − η·clip(m / max(γh, ε), 1), elementwise, so that it works on ZeRO's flat fp32 partitions.

    `mode` says what the gradient of the next `step()` is:
      "parameters": m ← β1·m + (1−β1)·g, then the step above.
      "hessian":    h ← β2·h + (1−β2)·B·g⊙g with g the gradient of the mean loss over B sampled labels
                    (Gauss-Newton-Bartlett); parameters, m and step counts stay as they are.

    h lives in `exp_avg_sq` and m in `exp_avg`, the names that DeepSpeed's universal checkpoint knows; both are made
    together and updated in place, since ZeRO keeps views of them. ZeRO may call `step` once per sub-group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})
        self.mode: Literal["parameters", "hessian"] = "parameters"
        self.hessian_tokens = 1.0
        """B, sampled labels behind the gradient of a "hessian" step, over all ranks."""
        self._clipped: list[Tensor] = []
        self._size = 0

    def init_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = 0  # an int: ZeRO's loader would share a tensor between sub-groups
            state["exp_avg"] = torch.zeros_like(p.data)
            state["exp_avg_sq"] = torch.zeros_like(p.data)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.init_state(p)
                m, h = state["exp_avg"], state["exp_avg_sq"]
                if self.mode == "hessian":
                    h.mul_(beta2).addcmul_(p.grad, p.grad, value=(1 - beta2) * self.hessian_tokens)
                    continue
                state["step"] += 1
                if group["weight_decay"]:
                    p.data.mul_(1 - group["lr"] * group["weight_decay"])
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                direction = m / (group["gamma"] * h).clamp_min(group["eps"])
                self._clipped.append((direction.abs() >= 1).sum())
                self._size += p.numel()
                p.data.add_(direction.clamp_(-1, 1), alpha=-group["lr"])

    def take_clip_counts(self) -> tuple[int, int]:
        """(clipped, all) coordinates on this rank since the last call; ZeRO's padding counts as not clipped."""
        counts = int(sum(int(c) for c in self._clipped)), self._size
        self._clipped, self._size = [], 0
        return counts
