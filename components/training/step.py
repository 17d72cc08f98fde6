"""One optimizer step, and what is done when its numbers are bad."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.config import Influence, Objective, Soul
from components.data.streams import StepRows
from components.errors import BadNumbers, TrainingError
from components.objectives.weights import balance_due, balanced, dual_step, weights_at
from components.optimizers.choose import learning_rate
from components.optimizers.soul import refresh_due
from components.training.batches import MicroBatch
from components.training.checkpoint import Course
from components.training.checkpoint_files import Place, steps_kept
from components.training.curvature import refresh_curvature
from components.training.engine import Outputs, optimizer_step
from components.training.gradients import measure
from components.training.job import Job, note
from components.training.losses import combined
from components.training.passes import Setup, Step, accumulate, sum_over_ranks

BAD_STEPS = "train/bad_steps"  # metric of a step that was left out


class Done(NamedTuple):
    """One step, done or left out."""

    course: Course
    """Where training stands after it."""
    measured: dict[str, float]
    tokens: float
    """Input tokens over all ranks."""
    rows: str
    """Digest of its rows, the record of what was trained on when."""


def one_step(setup: Setup, course: Course, steps: int) -> Done:
    """One optimizer step.

    Raises:
        BadNumbers: on all ranks alike when a loss or gradient is not finite; no parameter is changed then.
    """
    job, objective, plan, optimizer = setup.job, setup.job.objective, setup.batcher.plan, setup.optimizer
    number, learnt, clip_fraction = course.step, course.learnt, course.clip_fraction
    since_refresh = course.since_refresh
    step = step_of(setup, number)
    weights = weights_at(objective, number, steps, plan.steps_per_epoch, learnt)
    measured: dict[str, float] = {}
    if to_balance := balance_due(objective, number):
        norms, _ = measure(setup, step, to_balance)
        learnt = balanced(objective, learnt, weights, norms)
        weights = weights_at(objective, number, steps, plan.steps_per_epoch, learnt)
    if _angle_due(job, number):
        measured = _angle(setup, step)
    if isinstance(job.optimizer, Influence):
        refresh_curvature(setup, step, weights)
    elif isinstance(job.optimizer, Soul):
        if refresh_due(job.optimizer, since_refresh, clip_fraction):
            _refresh(setup, step, weights)
            since_refresh = 0
        since_refresh = (since_refresh or 0) + 1
    rate = learning_rate(job.optimizer.lr, job.train, number, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate

    totals, tokens = objective_backward(setup, step, weights)
    grad_norm = optimizer_step(setup.engine, f"the objective at step {number + 1}")
    if isinstance(job.optimizer, Soul):
        optimizer.own_square = None  # type: ignore[attr-defined]
        measured["train/clip_fraction"] = clip_fraction = _clip_fraction(setup)
    learnt = dual_step(objective, learnt, {g: totals[f"{g}_loss"] for g in learnt}, number // plan.steps_per_epoch)
    measured = {
        **{f"train/{name}": value for name, value in totals.items()},
        **{f"train/{group}_weight": weights[group] for group in _varying(objective)},
        **measured,
        "train/grad_norm": grad_norm,
        "train/lr": rate,
    }
    course = course._replace(step=number + 1, learnt=learnt, since_refresh=since_refresh, clip_fraction=clip_fraction)
    return Done(course, measured, tokens, _digest(step.rows))


def leave_out(setup: Setup, course: Course, bad: BadNumbers) -> Done:
    """The step whose numbers were bad, recorded and passed over; parameters and momentum are as before it.

    Raises:
        TrainingError: when there were more of them than allowed.
    """
    job, number, batcher = setup.job, course.step + 1, setup.batcher
    setup.optimizer.own_square = None  # type: ignore[attr-defined]
    rows = batcher.plan.step_rows(course.step)
    ranks = bad.ranks or tuple(range(batcher.world))
    at = np.concatenate([batcher._replace(rank=rank).share(rows) for rank in ranks])
    ids = {
        group: [own.row_id(int(i)) for i in chosen[at].flat]
        for group, own, chosen in (("forget", batcher.forget, rows.forget), ("normal", batcher.normal, rows.normal))
        if own
    }
    count = course.bad_steps + 1
    if batcher.rank == 0:
        text = f"step {number} left out, {count} of {job.train.max_bad_steps} allowed: {bad}"
        note(job, "bad_step", text, step=number, ranks=ranks, rows=ids)
    if count > job.train.max_bad_steps:
        shown = "; ".join(f"{group} {', '.join(found[:8])}{' …' * (len(found) > 8)}" for group, found in ids.items())
        raise TrainingError(f"{bad} Rows of the batch: {shown}. {_last_checkpoint(job)}") from None
    return Done(course._replace(step=number, bad_steps=count), {BAD_STEPS: float(count)}, 0.0, _digest(rows))


def _last_checkpoint(job: Job) -> str:
    try:
        kept = steps_kept(Place(job.checkpoints)) if job.checkpoints else []
    except OSError as error:
        return f"The checkpoints cannot be looked at: {error}."
    return f"The last checkpoint is that of step {kept[0]}." if kept else "There is no checkpoint."


def _digest(rows: StepRows) -> str:
    return hashlib.sha256(b"".join(indices.tobytes() for indices in rows)).hexdigest()[:12]


def step_of(setup: Setup, number: int) -> Step:
    """The rows of step `number`, from 0, and their counts."""
    rows = setup.batcher.plan.step_rows(number)
    return Step(number, rows, setup.batcher.counts(rows))


def objective_backward(setup: Setup, step: Step, weights: dict[str, float]) -> tuple[dict[str, float], float]:
    """(what to log, input tokens), over all ranks, with the gradients of the objective left in the engine.

    Raises:
        BadNumbers: on all ranks alike when a term is not finite.
    """
    sums: dict[str, Tensor] = {}
    of_terms = combined(setup, step, weights)

    def loss(outputs: Outputs, batch: MicroBatch) -> Tensor:
        value, parts = of_terms(outputs, batch)
        for name, part in parts.items():
            sums[name] = sums.get(name, torch.zeros((), device=setup.device)) + part
        return value

    tokens = accumulate(setup, step, setup.job.objective.groups(), loss, what=None)
    totals = sum_over_ranks({**sums, "tokens": torch.tensor(float(tokens), device=setup.device)}, setup, step)
    return totals, totals.pop("tokens")


def _refresh(setup: Setup, step: Step, weights: dict[str, float]) -> None:
    """Renew SOUL's Hessian, or have the next step do it with its own gradient."""
    config = setup.job.optimizer
    assert isinstance(config, Soul)
    if config.curvature == "squared_gradient" and config.curvature_of == "all":
        tokens = sum(step.counts[group] for group in weights)
        setup.optimizer.own_square = config.batch_factor or float(tokens)  # type: ignore[attr-defined]
    else:
        refresh_curvature(setup, step, weights)


def _varying(objective: Objective) -> list[str]:
    return [group for group, term in objective.terms().items() if not isinstance(term.weight, float)]


def _angle_due(job: Job, step: int) -> bool:
    every = job.train.gradient_cosine_every
    return every is not None and step % every == 0 and {"forget", "normal"} <= {*job.objective.terms()}


def _angle(setup: Setup, step: Step) -> dict[str, float]:
    norms, cosine = measure(setup, step, ("forget", "normal"))
    found = {f"train/{group}_grad_norm": norm for group, norm in norms.items()}
    return found if cosine is None else found | {"train/gradient_cosine": cosine}


def _clip_fraction(setup: Setup) -> float:
    counts = torch.tensor(setup.optimizer.take_clip_counts(), dtype=torch.float64, device=setup.device)  # type: ignore[attr-defined]
    torch.distributed.all_reduce(counts)
    return float(counts[0] / counts[1])
