"""What one rank holds while it trains, and a pass over a step's rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.data.streams import StepRows
from components.training.batches import Batcher, MicroBatch, to_device
from components.training.engine import Outputs, backward
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
    labels_key: int | None = None,
) -> int:
    """Forward and backward of `loss` over this rank's micro-batches of the step. Returns the input tokens.

    The losses of all micro-batches and ranks are to add up to the one whose gradient is wanted.
    """
    batches = list(setup.batcher.micro_batches(step.rows, groups, labels_key))
    for k, batch in enumerate(batches):
        here = to_device(batch, setup.device)
        outputs = setup.engine(here.input_ids, here.positions, here.position_ids)
        # DeepSpeed averages gradients over the ranks; the losses are already divided by global counts.
        backward(setup.engine, loss(outputs, here) * setup.batcher.world, last=k == len(batches) - 1)
    return sum(batch.tokens for batch in batches)
