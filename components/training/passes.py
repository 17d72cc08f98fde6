"""What one rank holds while it trains, and a pass over a step's rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.data.streams import StepRows
from components.errors import BadNumbers
from components.training.batches import Batcher, MicroBatch, to_device
from components.training.engine import Outputs, backward, discard_gradients
from components.training.job import Job


class Setup(NamedTuple):
    """One rank's part of a job."""

    job: Job
    batcher: Batcher
    optimizer: torch.optim.Optimizer
    engine: Any
    device: torch.device
    direction: Tensor | None
    """RMU's steering direction."""
    masks: list[Tensor] | None = None
    """For each of the engine's `optimizer_parameters`, which of its numbers may move; None where all may."""


class Step(NamedTuple):
    """One optimizer step."""

    number: int
    """Counted from 0."""
    rows: StepRows
    counts: dict[str, int]
    """Answer tokens and rows of each group over all ranks."""


def accumulate(
    setup: Setup,
    step: Step,
    groups: tuple[str, ...],
    loss: Callable[[Outputs, MicroBatch], Tensor],
    what: str | None,
    labels_key: int | None = None,
) -> int:
    """Forward and backward of `loss` over this rank's micro-batches of the step. Returns the input tokens.

    The losses of all micro-batches and ranks are to add up to the one whose gradient is wanted.

    Raises:
        BadNumbers: on all ranks alike, naming `what` it was the loss of, when their sum is not finite; with None
            that is left to the caller.
    """
    total = torch.zeros((), device=setup.device)
    batches = list(setup.batcher.micro_batches(step.rows, groups, labels_key))
    for k, batch in enumerate(batches):
        here = to_device(batch, setup.device)
        outputs = setup.engine(here.input_ids, here.positions, here.position_ids)
        value = loss(outputs, here)
        total += value.detach()
        # DeepSpeed averages gradients over the ranks; the losses are already divided by global counts.
        backward(setup.engine, value * setup.batcher.world, last=k == len(batches) - 1)
    if what:
        sum_over_ranks({what: total}, setup, step)
    return sum(batch.tokens for batch in batches)


def sum_over_ranks(sums: dict[str, Tensor], setup: Setup, step: Step) -> dict[str, float]:
    """The numbers added up over the ranks. Every rank has the same names in the same order: one all-reduce serves all.

    Raises:
        BadNumbers: on all ranks alike, naming step, numbers and ranks, when some are not finite; the gradients are
            gone then.
    """
    mine = torch.stack([value.double() for value in sums.values()])
    values = mine.clone()
    torch.distributed.all_reduce(values)
    totals = dict(zip(sums, values.tolist(), strict=True))
    if bad := [name for name, value in totals.items() if not abs(value) < float("inf")]:
        every = [torch.empty_like(mine) for _ in range(setup.batcher.world)]
        torch.distributed.all_gather(every, mine)
        ranks = [rank for rank, theirs in enumerate(every) if not torch.isfinite(theirs).all()]
        discard_gradients(setup.engine)
        error = BadNumbers(
            f"Loss is not finite at step {step.number + 1} ({', '.join(bad)}; on rank "
            f"{', '.join(map(str, ranks)) or 'none'}). No parameter was changed by this step. Lower optimizer.lr or "
            "objective.forget.weight, or set train.gradient_clipping."
        )
        error.ranks = tuple(ranks)
        raise error
    return totals
