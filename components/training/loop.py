"""The training loop: the same function in this process, in each Ray Train worker and inside a trial."""

import json
import resource
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from components.errors import BadNumbers, TrainingError
from components.files import append_line, read_lines, whole_folder, write_whole, writing
from components.models import check_packing, hidden_size, load_model, quiet_libraries
from components.objectives.weights import first_learnt
from components.optimizers.choose import make_optimizer
from components.training.batches import Batcher
from components.training.checkpoint import Course, gathered, resume
from components.training.checkpoint_files import Place, best_step, clear_unfinished
from components.training.engine import (
    consolidated_state,
    optimizer_parameters,
    start_engine,
)
from components.training.gradients import choose_mask, hold
from components.training.guards import broken, check_measured, last_good, probe, seen, worse_than_guessing
from components.training.job import Job, make_plan, note, open_sets, total_steps
from components.training.losses import steering_direction
from components.training.passes import Setup
from components.training.reference import Reference
from components.training.saving import Saving, alone, check_room
from components.training.step import BAD_STEPS, leave_out, one_step, step_of
from components.training.trainable import answer_model, save_result

_NOTICE_SECONDS = 2.0  # between two questions whether a machine is about to go


def train_loop(
    job: Job, rank: int, world: int, device: torch.device, notice: Callable[[], tuple[str, ...]] | None = None
) -> dict[str, Any]:
    """Train `job.model` and write the result to `job.output`. torch.distributed must be up, with `world` ranks.

    `notice` is asked by all ranks together, every few seconds, which of their machines are about to go.

    Returns the number of steps behind the result, seconds, `stopped`: True when somebody made the file `job.stop`, in
    which case there is a checkpoint and no result, and `collapsed_since`: the step from which on, to the last one, the
    model answered normal rows worse than by guessing, None where it does not. The course of training is in
    `job.metrics` and `job.events`.

    Raises:
        TrainingError: on all ranks alike when more than `train.max_bad_steps` steps had a loss or gradient that is not
            finite, or a guard was broken before any checkpoint.
        StorageError: when a checkpoint, the model or the metrics cannot be written.
    """
    quiet_libraries()
    before = _memory_at_start(device)
    setup, steps = set_up(job, rank, world, device)
    place = Place(job.checkpoints) if job.checkpoints else None
    setup, course = _resumed(setup, place, steps)
    saving = Saving(setup, place, gathered(uuid.uuid4().hex[:8], setup)[0]) if place else None
    guard, stopped, best = None, False, job.train.checkpoint_best
    started = looked = time.perf_counter()
    noticed: tuple[str, ...] = ()

    try:
        while course.step < steps and not stopped and not guard and not _has_collapsed(course, job):
            step_started = time.perf_counter()
            try:
                course, measured, tokens, rows = one_step(setup, course, steps)
            except BadNumbers as bad:
                if saving and course.bad_steps >= job.train.max_bad_steps:
                    saving.settle()  # before it is told which checkpoint is the last
                course, measured, tokens, rows = leave_out(setup, course, bad)
            number = course.step
            if job.train.probe and (number % job.train.probe.every == 0 or number == steps):
                measured |= probe(setup, job.train.probe, steps)
            if BAD_STEPS not in measured:
                check_measured(job.guards, measured)
            guard = broken(job.guards, measured)
            if not guard:
                course = course._replace(seen=seen(job.guards, measured, number, course.seen))
                course = _watched(setup, course, measured)
            asked = rank == 0 and job.stop is not None and Path(job.stop).exists()
            due = rank == 0 and time.perf_counter() - looked > _NOTICE_SECONDS
            memory, stopped, look = _largest(setup, _peak_memory(device) - before, asked, notice is not None and due)
            if rank == 0:
                seconds = time.perf_counter() - step_started
                line = {
                    "time": time.time(), "step": number, "steps": steps, "rows": rows, **measured,
                    "perf/tokens_per_second": tokens / seconds, "perf/step_seconds": seconds,
                    "perf/memory_gib": memory / 2**30,
                }  # fmt: skip
                with writing("Metrics", job.metrics):
                    append_line(Path(job.metrics), line)
            just_in_time = False
            if look and notice is not None:
                looked = time.perf_counter()
                just_in_time = (going := notice()) not in ((), noticed)
                noticed = going
                if just_in_time and rank == 0:
                    note(job, "notice", f"a machine is about to go: checkpoint after step {number}", step=number)
            if saving and not guard and (stopped or just_in_time or _checkpoint_due(job, number, steps)):
                saving.save(course, measured.get(best.metric) if best else None)
    except Exception:
        if saving:
            saving.settle()
        raise
    if saving:
        saving.finish()
    seconds = time.perf_counter() - started
    if stopped and course.step < steps:
        return _ended(setup, course, seconds, stopped=True)
    if guard or job.train.checkpoint_best:
        course = _gone_back(setup, place, course, guard)
    _write_model(setup)
    return _ended(setup, course, seconds, stopped=False)


def _write_model(setup: Setup) -> None:
    job, state = setup.job, consolidated_state(setup.engine)

    def write() -> None:
        assert state is not None
        needed = sum(tensor.nbytes for tensor in state.values())
        with writing("Model", job.output, needed), whole_folder(Path(job.output)) as folder:
            save_result(job, setup.engine.module.model, state, folder)

    alone(setup, write if setup.batcher.rank == 0 and state is not None else None)


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


def _resumed(setup: Setup, place: Place | None, steps: int) -> tuple[Setup, Course]:
    """The setup with its masks, at the newest whole checkpoint or at the start."""
    job, rank = setup.job, setup.batcher.rank
    if job.mask:  # filled by a checkpoint, else chosen
        setup = setup._replace(
            masks=[torch.zeros_like(p, dtype=torch.bool) for p in optimizer_parameters(setup.engine)]
        )
    course = None
    if place:
        if rank == 0:
            clear_unfinished(place)
            check_room(setup, place)
        course, told = resume(setup, place)
        for text in told if rank == 0 else []:
            note(job, "checkpoint", text)
    if course is None and job.mask:
        first = [step_of(setup, number) for number in range(min(job.mask.batches, steps))]
        setup = setup._replace(masks=choose_mask(setup, job.mask, first))
    if setup.masks is not None:
        hold(setup)
    if rank == 0:  # what was done after the checkpoint is done again
        _keep_lines(Path(job.metrics), course.step if course else 0)
        if course:
            note(job, "resumed", f"going on after step {course.step}", step=course.step)
    return setup, course or Course(0, first_learnt(job.objective), {})


def _checkpoint_due(job: Job, number: int, steps: int) -> bool:
    every = job.train.checkpoint_every
    return every is not None and (number % every == 0 or (number == steps and job.train.checkpoint_best is not None))


def _gone_back(setup: Setup, place: Place | None, course: Course, guard: str | None) -> Course:
    """The checkpoint that is to become the model: the last within all guards, or the best."""
    assert place is not None
    job, best = setup.job, setup.job.train.checkpoint_best
    step: int | None = last_good(job.guards, course.seen)
    if not guard and best:
        step = gathered(best_step(place, best.mode) if setup.batcher.rank == 0 else None, setup)[0]
    if step == course.step or step is None:
        return course
    found, told = resume(setup, place, at_most=step)
    if found is None and guard:
        raise TrainingError(
            f"A guard was broken before any checkpoint ({guard} in step {course.step}). Expected some steps within all "
            "guards. Lower optimizer.lr or train.checkpoint_every, or loosen the guard."
        )
    why = f"guard: {guard} in step {course.step}" if guard else f"best {best.metric}" if best else ""
    if found:
        told.append(f"{why}; the model is that of step {found.step}")
    for text in told if setup.batcher.rank == 0 else []:
        note(job, "guard" if guard else "best", text)
    return found or course


def _watched(setup: Setup, course: Course, measured: dict[str, float]) -> Course:
    """The course with the steps counted in which the model did worse on normal rows than a guess would."""
    if BAD_STEPS in measured:
        return course
    vocabulary = setup.engine.module.model.config.get_text_config().vocab_size
    at_start = course.normal_loss_at_start
    if at_start is None:
        at_start = measured.get("train/normal_loss")
    worse = worse_than_guessing(setup.job.objective, measured, vocabulary, at_start or 0.0)
    course = course._replace(collapsed=course.collapsed + 1 if worse else 0, normal_loss_at_start=at_start)
    if worse and setup.batcher.rank == 0 and (course.collapsed == 1 or _has_collapsed(course, setup.job)):
        then = ": training stops" if _has_collapsed(course, setup.job) else ""
        note(setup.job, "collapse", f"step {course.step}: the model collapses, {worse}{then}", step=course.step)
    return course


def _has_collapsed(course: Course, job: Job) -> bool:
    return job.train.stop_collapsed is not None and course.collapsed >= job.train.stop_collapsed


def _ended(setup: Setup, course: Course, seconds: float, stopped: bool) -> dict[str, Any]:
    torch.distributed.barrier()
    setup.engine.destroy()
    since = course.step - course.collapsed + 1 if course.collapsed else None
    return {
        "steps": course.step, "seconds": seconds, "world": setup.batcher.world, "stopped": stopped,
        "collapsed_since": since,
    }  # fmt: skip


def _keep_lines(metrics: Path, steps: int) -> None:
    kept = [line for line in read_lines(metrics) if line["step"] <= steps]
    write_whole(metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _memory_at_start(device: torch.device) -> float:
    """Forget earlier peaks. Returns the bytes that are not the job's: on a CPU, what the process has already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> float:
    """Peak bytes: of the GPU's memory, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _largest(setup: Setup, *values: float) -> list[Any]:
    """Of each value, the largest of all ranks'."""
    found = torch.tensor(values, dtype=torch.float64, device=setup.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()
