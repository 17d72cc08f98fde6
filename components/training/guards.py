"""What must not break while a model forgets: bounds on metrics, and a probe of what is kept and what forgotten."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from components.config import Guard, KlToOriginal, Nll, Objective, Probe
from components.data.streams import StepRows, draw
from components.errors import ConfigError
from components.training.batches import to_device
from components.training.passes import Setup

PROBE = "probe/"  # what its metrics begin with


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


def worse_than_guessing(
    objective: Objective, metrics: Mapping[str, float], vocabulary: int, at_start: float = 0.0
) -> str | None:
    """Say how badly the model answers normal rows if a uniform guess among `vocabulary` tokens does better, else None.

    The guess loses ln V nats per token, and its KL from the original is ln V minus the original's entropy. Only of
    unlearning, and of a loss above that `at_start`: a model that still has to learn the normal rows begins there.
    """
    if not (objective.forget or objective.random):
        return None
    guess, loss = math.log(vocabulary), metrics.get("train/normal_loss")
    if loss is not None and isinstance(objective.normal, KlToOriginal | Nll) and loss > max(guess, at_start):
        return f"train/normal_loss {loss:.3g} is above {guess:.3g}, that of guessing"
    probability = metrics.get(f"{PROBE}normal_probability")
    if probability is not None and probability < 1 / vocabulary:
        return f"probe/normal_probability {probability:.2g} is below {1 / vocabulary:.2g}, that of guessing"
    return None


def seen(guards: Sequence[Guard], metrics: Mapping[str, float], step: int, before: dict[str, int]) -> dict[str, int]:
    """For each guard the last step after which it is known to hold, given that all do in step `step`'s `metrics`.

    A step's own metrics are measured before its update, so they speak of the step before; the probe comes after it.
    """
    now = {g.metric: step if g.metric.startswith(PROBE) else step - 1 for g in guards if g.metric in metrics}
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
        if not guard.metric.startswith(PROBE) and guard.metric not in metrics:
            raise ConfigError(
                f"Guard is on what is not measured (metric={guard.metric}). Expected one of "
                f"{', '.join(sorted(metrics))} or, with train.probe, probe/normal_probability."
            )


def probe(setup: Setup, config: Probe, steps: int) -> dict[str, float]:
    """Mean over some forget and some normal rows of p(answer)^(1/tokens) as the model stands now. A collective.

    The rows are drawn once for the whole run, the normal ones among those that its steps use.
    """
    rows, groups = probe_rows(setup, config, steps), _groups(setup)
    totals = torch.zeros(len(groups), dtype=torch.float64, device=setup.device)
    with torch.no_grad():
        for batch in setup.batcher.micro_batches(rows, groups):
            here = to_device(batch, setup.device)
            logits = setup.engine(here.input_ids, here.positions, here.position_ids).logits
            for place, answers in enumerate(here.groups.values()):
                own = logits[answers.first : answers.first + len(answers.targets)].float()
                logp = answers.padded(-torch.nn.functional.cross_entropy(own, answers.targets, reduction="none"))
                if len(answers.targets):
                    totals[place] += (logp.double().sum(1) / answers.mask.sum(1)).exp().sum()
    torch.distributed.all_reduce(totals)
    means = (totals / len(rows.counter)).tolist()
    return {f"{PROBE}{group}_probability": mean for group, mean in zip(groups, means, strict=True)}


def probe_rows(setup: Setup, config: Probe, steps: int) -> StepRows:
    """The probe's rows, shaped as a step: as many of each set."""
    plan, groups = setup.batcher.plan, _groups(setup)
    sets = {"forget": np.arange(plan.forget), "normal": plan.normal_rows(steps)}
    count = min([config.rows, *(len(sets[group]) for group in groups)])
    chosen = {
        group: np.sort(draw(setup.job.seed, f"probe-{group}", 0).choice(sets[group], count, replace=False))
        for group in groups
    }
    nothing = np.zeros(count, dtype=np.int64)
    return StepRows(
        forget=chosen.get("forget", nothing), normal=chosen.get("normal", nothing),
        random=np.zeros((count, 0), dtype=np.int64), counter=np.arange(count),
    )  # fmt: skip


def _groups(setup: Setup) -> tuple[str, ...]:
    batcher = setup.batcher
    return tuple(name for name, own in (("forget", batcher.forget), ("normal", batcher.normal)) if own is not None)
