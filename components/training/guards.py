"""What must not break while a model forgets: bounds on metrics, and a probe of what is to be kept."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from components.config import Guard, Probe
from components.data.streams import StepRows, draw
from components.training.batches import to_device
from components.training.passes import Setup

PROBE = "probe/normal_probability"


def broken(guards: Sequence[Guard], metrics: Mapping[str, float]) -> str | None:
    """The first bound that `metrics` leave, said in words; None when all that were measured hold."""
    for guard in guards:
        value = metrics.get(guard.metric)
        if value is None:
            continue
        if guard.min is not None and not value >= guard.min:
            return f"{guard.metric} {value:.4g} is below {guard.min:g}"
        if guard.max is not None and not value <= guard.max:
            return f"{guard.metric} {value:.4g} is above {guard.max:g}"
    return None


def seen_good(guards: Sequence[Guard], metrics: Mapping[str, float], step: int, seen: dict[str, int]) -> int:
    """The last step after which all guards are known to hold, given that they do in step `step`'s `metrics`.

    `seen` remembers it for each guard. A step's own metrics are measured before its update, so they speak of the step
    before; the probe comes after it.
    """
    for guard in guards:
        if guard.metric in metrics:
            seen[guard.metric] = step if guard.metric == PROBE else step - 1
    return min((seen.get(guard.metric, 0) for guard in guards), default=step)


def probe(setup: Setup, config: Probe, steps: int) -> float:
    """Mean over some normal rows of p(answer)^(1/tokens) as the model stands now. A collective.

    The rows are drawn once for the whole run among those that its steps use.
    """
    rows = probe_rows(setup, config, steps)
    total = torch.zeros(2, dtype=torch.float64, device=setup.device)
    with torch.no_grad():
        for batch in setup.batcher.micro_batches(rows, ("normal",)):
            here = to_device(batch, setup.device)
            logits = setup.engine(here.input_ids, here.positions, here.position_ids).logits
            answers = here.groups["normal"]
            logp = answers.padded(-torch.nn.functional.cross_entropy(logits.float(), answers.targets, reduction="none"))
            if len(answers.targets):
                total[0] += (logp.double().sum(1) / answers.mask.sum(1)).exp().sum()
                total[1] += len(answers.mask)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def probe_rows(setup: Setup, config: Probe, steps: int) -> StepRows:
    """The probe's rows, shaped as a step that has nothing else."""
    used = setup.batcher.plan.normal_rows(steps)
    count = min(config.rows, len(used))
    chosen = np.sort(draw(setup.job.seed, "probe", 0).choice(used, count, replace=False))
    return StepRows(
        forget=np.zeros(count, dtype=np.int64), normal=chosen, random=np.zeros((count, 0), dtype=np.int64),
        counter=np.arange(count),
    )  # fmt: skip


def is_good(value: float) -> bool:
    """Finite, so that JSON and MLflow can hold it."""
    return math.isfinite(value)
