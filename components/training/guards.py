"""What must not break while a model forgets: bounds on metrics, and a probe of what is to be kept."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from components.config import Guard, Probe
from components.data.streams import StepRows, draw
from components.errors import ConfigError
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


def seen(guards: Sequence[Guard], metrics: Mapping[str, float], step: int, before: dict[str, int]) -> dict[str, int]:
    """For each guard the last step after which it is known to hold, given that all do in step `step`'s `metrics`.

    A step's own metrics are measured before its update, so they speak of the step before; the probe comes after it.
    """
    now = {g.metric: step if g.metric == PROBE else step - 1 for g in guards if g.metric in metrics}
    return {**before, **now}


def last_good(guards: Sequence[Guard], seen_: Mapping[str, int]) -> int:
    """The last step after which all guards are known to hold."""
    return min((seen_.get(guard.metric, 0) for guard in guards), default=0)


def check_measured(guards: Sequence[Guard], metrics: Mapping[str, float]) -> None:
    """Refuse a guard on what no step measures.

    Raises:
        ConfigError: with what there is.
    """
    for guard in guards:
        if guard.metric != PROBE and guard.metric not in metrics:
            raise ConfigError(
                f"Guard is on what is not measured (metric={guard.metric}). Expected one of "
                f"{', '.join(sorted(metrics))} or, with train.probe, {PROBE}."
            )


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
