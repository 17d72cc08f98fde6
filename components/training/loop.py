"""The training loop: the same function in this process, in each Ray Train worker and inside a trial."""

import json
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.config import Influence, Objective, Soul
from components.files import whole_folder, write_whole
from components.models import check_packing, hidden_size, load_model, quiet_libraries
from components.objectives.weights import balance_due, balanced, dual_step, first_learnt, weights_at
from components.optimizers.choose import learning_rate, make_optimizer
from components.optimizers.soul import refresh_due
from components.training.batches import Batcher, MicroBatch
from components.training.checkpoint import Course, Saving, clear_partial, load, newest
from components.training.curvature import refresh_curvature
from components.training.engine import Outputs, consolidated_state, optimizer_parameters, optimizer_step, start_engine
from components.training.gradients import choose_mask, hold, measure
from components.training.job import Job, make_plan, open_sets, total_steps
from components.training.losses import combined, steering_direction
from components.training.passes import Setup, Step, accumulate, sum_over_ranks
from components.training.reference import Reference
from components.training.trainable import answer_model, save_result


def train_loop(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """Train `job.model` and write the result to `job.output`. torch.distributed must be up, with `world` ranks.

    Returns the number of steps and seconds; the course of training is in `job.metrics`.

    Raises:
        TrainingError: on all ranks alike when a loss is not finite, before any parameter changes.
    """
    quiet_libraries()
    before = _memory_at_start(device)
    setup, steps = set_up(job, rank, world, device)
    setup, course = _resumed(setup, steps)
    saving = Saving(setup, Path(job.checkpoints), job.train.keep_checkpoints) if job.checkpoints else None
    objective, plan, optimizer = job.objective, setup.batcher.plan, setup.optimizer
    learnt, since_refresh, clip_fraction = course.learnt, course.since_refresh, course.clip_fraction
    started = time.perf_counter()

    for number in range(course.step, steps):
        step_started = time.perf_counter()
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
        memory = _over_ranks(torch.tensor(_peak_memory(device) - before, device=device), torch.distributed.ReduceOp.MAX)
        if rank == 0:
            seconds = time.perf_counter() - step_started
            line = {
                "time": time.time(),
                "step": number + 1,
                "steps": steps,
                **{f"train/{name}": value for name, value in totals.items()},
                **{f"train/{group}_weight": weights[group] for group in _varying(objective)},
                **measured,
                "train/grad_norm": grad_norm,
                "train/lr": rate,
                "perf/tokens_per_second": tokens / seconds,
                "perf/step_seconds": seconds,
                "perf/memory_gib": memory / 2**30,
            }
            with open(job.metrics, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        if saving and job.train.checkpoint_every and (number + 1) % job.train.checkpoint_every == 0:
            saving.save(Course(number + 1, learnt, since_refresh, clip_fraction))

    if saving:
        saving.finish()
    seconds = time.perf_counter() - started
    state = consolidated_state(setup.engine)
    if rank == 0 and state is not None:
        with whole_folder(Path(job.output)) as folder:
            save_result(job, setup.engine.module.model, state, folder)
    torch.distributed.barrier()
    setup.engine.destroy()
    return {"steps": steps, "seconds": seconds, "world": world}


def make_batcher(job: Job, rank: int, world: int, device: torch.device) -> Batcher:
    """Open the prepared rows that the objective uses."""
    sets = open_sets(job)
    references = {group: Reference(Path(folder), device) for group, folder in job.reference.items()}
    return Batcher(make_plan(job, sets), *sets, references, job.train.micro_batch_size, job.train.packing, rank, world)


def set_up(job: Job, rank: int, world: int, device: torch.device) -> tuple[Setup, int]:
    """(this rank's part of the job, its number of steps): rows open, model in the engine."""
    batcher = make_batcher(job, rank, world, device)
    steps = total_steps(job, batcher.plan)
    model = load_model(Path(job.model)).to(device)
    if job.train.packing:
        check_packing(model, Path(job.model))
    answering = answer_model(model, job)
    optimizer = make_optimizer(job.optimizer, answering, steps)
    engine = start_engine(answering, optimizer, job.train)
    direction = None
    if job.objective.layer is not None:
        direction = steering_direction(job.seed, hidden_size(Path(job.model), last=False)).to(device)
    return Setup(job, batcher, optimizer, engine, device, direction), steps


def _resumed(setup: Setup, steps: int) -> tuple[Setup, Course]:
    """The setup with its masks, at the newest whole checkpoint or at the start."""
    job, rank = setup.job, setup.batcher.rank
    found: list[str | None] = [None]
    if job.checkpoints and rank == 0:
        clear_partial(Path(job.checkpoints))
        found = [str(checkpoint) if (checkpoint := newest(Path(job.checkpoints))) else None]
    torch.distributed.broadcast_object_list(found, device=setup.device)
    if found[0] is None and job.mask:
        first = [step_of(setup, number) for number in range(min(job.mask.batches, steps))]
        setup = setup._replace(masks=choose_mask(setup, job.mask, first))
    elif job.mask:
        setup = setup._replace(
            masks=[torch.zeros_like(p, dtype=torch.bool) for p in optimizer_parameters(setup.engine)]
        )
    course = load(setup, Path(found[0])) if found[0] else Course(0, first_learnt(job.objective), None, None)
    if setup.masks is not None:
        hold(setup)
    if rank == 0:  # what was done after the checkpoint is done again
        _keep_lines(Path(job.metrics), course.step)
    return setup, course


def _keep_lines(metrics: Path, steps: int) -> None:
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    write_whole(metrics, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps))


def step_of(setup: Setup, number: int) -> Step:
    """The rows of step `number`, from 0, and their counts."""
    rows = setup.batcher.plan.step_rows(number)
    return Step(number, rows, setup.batcher.counts(rows))


def objective_backward(setup: Setup, step: Step, weights: dict[str, float]) -> tuple[dict[str, float], float]:
    """(what to log, input tokens), over all ranks, with the gradients of the objective left in the engine.

    Raises:
        TrainingError: on all ranks alike when a term is not finite.
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


def _memory_at_start(device: torch.device) -> float:
    """Forget earlier peaks. Returns the bytes that are not the job's: on a CPU, what the process has already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> float:
    """Peak bytes: of the GPU's memory, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _over_ranks(value: Tensor, how: Any) -> float:
    value = value.double()
    torch.distributed.all_reduce(value, how)
    return float(value)
