"""Gradients of single terms: their norms, the angle between them, and the mask that WAGLE makes of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.config import Nll, Objective, Wagle
from components.errors import TrainingError
from components.training.batches import MicroBatch
from components.training.engine import Outputs, optimizer_parameters, visit_gradients
from components.training.losses import combined
from components.training.passes import Setup, Step, accumulate

_PIECE = 1 << 24  # numbers that are in memory in float64 at a time


def term_gradients(
    setup: Setup, steps: Sequence[Step], objective: Objective, weights: dict[str, float]
) -> list[Tensor]:
    """The mean gradient over `steps` of the terms that `weights` names, on this rank's `optimizer_parameters`.

    Over all ranks, not clipped, without touching the optimizer.
    """
    parameters = optimizer_parameters(setup.engine)
    sums = [torch.zeros_like(p.data) for p in parameters]
    place = {id(p): i for i, p in enumerate(parameters)}

    def add(p: nn.Parameter) -> None:
        sums[place[id(p)]].add_(p.grad, alpha=1 / len(steps))  # type: ignore[arg-type]

    what = f"{'+'.join(weights)} term"
    for step in steps:
        of_terms = combined(setup, step, weights, objective)

        def loss(outputs: Outputs, batch: MicroBatch, of_terms: Any = of_terms) -> Tensor:
            return of_terms(outputs, batch)[0]

        with visit_gradients(setup.engine, add, f"the {what} at step {step.number + 1}"):
            accumulate(setup, step, objective.groups(weights), loss, what)
    return sums


def measure(setup: Setup, step: Step, groups: Sequence[str]) -> tuple[dict[str, float], float | None]:
    """(norm of each group's unweighted term's gradient, cosine of forget's and normal's if both are asked for)."""
    found = {group: term_gradients(setup, [step], setup.job.objective, {group: 1.0}) for group in groups}
    squares = [_dot(found[group], found[group]) for group in groups]
    pair = [_dot(found["forget"], found["normal"])] if {"forget", "normal"} <= {*groups} else []
    totals = torch.stack([*squares, *pair]).to(setup.device)
    torch.distributed.all_reduce(totals)
    totals = totals / _copies(setup)
    norms = {group: float(total) ** 0.5 for group, total in zip(groups, totals, strict=False)}
    product = norms.get("forget", 0.0) * norms.get("normal", 0.0)
    return norms, float(totals[-1]) / product if pair and product else None


def choose_mask(setup: Setup, mask: Wagle, steps: Sequence[Step]) -> list[Tensor]:
    """Which numbers of each of the `optimizer_parameters` may move by WAGLE's score.

    score = |(θ − ∇L_normal/γ) ⊙ ∇L_forget| at the original (2410.17509, eq. 11), with the objective's forget term and
    the next-token loss on normal rows: a weight counts when forgetting depends on it and keeping does not.

    Raises:
        TrainingError: when none may.
    """
    keeping = Objective(normal=Nll(type="nll"))
    forget = term_gradients(setup, steps, setup.job.objective, {"forget": 1.0})
    normal = term_gradients(setup, steps, keeping, {"normal": 1.0})
    scores = [
        ((p.data - g_normal / mask.gamma) * g_forget).abs()
        for p, g_normal, g_forget in zip(optimizer_parameters(setup.engine), normal, forget, strict=True)
    ]
    total = sum(_true_size(p) for p in setup.engine.module.parameters() if p.requires_grad)
    bound = _kth_largest(scores, round(mask.keep * total), setup)
    free = [(score >= bound) & (score > 0) for score in scores]
    if not _count(setup, free, lambda mine: mine):
        raise TrainingError(
            "No weight may move: the gradient of the forget term is 0 everywhere at the original. Expected a term that "
            "has one there. Take another objective.forget, or leave mask out."
        )
    return free


def hold(setup: Setup) -> None:
    """Keep the weights that the masks do not name at their present value, bit by bit, whatever the optimizer does."""
    assert setup.masks is not None
    parameters = optimizer_parameters(setup.engine)
    free = {id(p): mask for p, mask in zip(parameters, setup.masks, strict=True)}
    decays = any(group.get("weight_decay") for group in setup.optimizer.param_groups)
    held = {id(p): p.data[~free[id(p)]].clone() for p in parameters if decays}

    def before(optimizer: Any, *rest: Any) -> None:
        for p in _with_gradient(optimizer):
            p.grad.mul_(free[id(p)])

    def after(optimizer: Any, *rest: Any) -> None:
        for p in _with_gradient(optimizer):
            p.data[~free[id(p)]] = held[id(p)]

    setup.optimizer.register_step_pre_hook(before)
    if decays:  # without a gradient nothing but weight decay moves a weight
        setup.optimizer.register_step_post_hook(after)


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _kth_largest(scores: list[Tensor], k: int, setup: Setup) -> float:
    """The k-th largest score over all ranks, exactly: numbers ≥ 0 are ordered as their bits, so 31 counts find it."""
    bits = [score.float().view(torch.int32) for score in scores]
    low, high = 0, 0x7F800000  # the answer is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if _count(setup, bits, lambda mine: mine >= middle) >= k:  # noqa: B023
            low = middle
        else:
            high = middle
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


def _count(setup: Setup, tensors: list[Tensor], where: Callable[[Tensor], Tensor]) -> float:
    mine = sum((where(tensor).sum() for tensor in tensors), torch.zeros((), dtype=torch.long))
    total = mine.double().to(setup.device)
    torch.distributed.all_reduce(total)
    return float(total) / _copies(setup)


def _copies(setup: Setup) -> int:
    """On how many ranks each optimizer parameter lies."""
    return setup.batcher.world if setup.job.train.zero_stage == 0 else 1


def _true_size(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    parts = [
        (x.double() * y.double()).sum()
        for mine, other in zip(a, b, strict=True)
        for x, y in zip(mine.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True)
    ]
    return torch.stack(parts).sum()
