"""One training job as plain data: everything `train_loop` needs, so that it can cross to any process."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from components.config import Guard, Objective, Optimizer, Section, Train, Wagle
from components.data.rows import PreparedRows
from components.data.streams import Plan
from components.files import append_line


class Job(Section):
    """Paths and settings of one training job."""

    model: str
    """Folder of the model to start from."""
    output: str
    """Folder to write the trained model to."""
    metrics: str
    """File to which rank 0 appends one JSON line a step."""
    events: str | None = None
    """File to which rank 0 appends one JSON line for whatever happens beside the steps."""
    system: str | None = None
    """Folder for a file a node of how busy it is."""
    stop: str | None = None
    """File that somebody makes when training is to end with a checkpoint."""
    group: str | None = None
    """File to which rank 0 writes the id of the placement group that holds Ray Train's workers."""
    checkpoints: str | None = None
    """Folder or address for checkpoints, of which the newest whole one is gone on from; None for neither."""
    made_from: dict[str, str] = Field(default={})
    """Digests of model and rows: a checkpoint made from others is refused."""
    forget: str | None = None
    """Folders of prepared rows; None when no term uses them."""
    normal: str | None = None
    random: str | None = None
    normal_without: str | None = None
    """File with the indices of normal rows to leave out."""
    reference: dict[str, str] = Field(default={})
    """Folder of the original model's reference pass, for each group whose term needs one."""
    objective: Objective
    optimizer: Optimizer
    train: Train
    mask: Wagle | None = None
    guards: list[Guard] = Field(default=[])
    responses_by_row: bool = False
    """Row i of `random` belongs to row i of `forget`."""
    seed: int


class Sets(NamedTuple):
    """The rows that a job trains on; None where no term uses them."""

    forget: PreparedRows | None
    normal: PreparedRows | None
    pool: PreparedRows | None


def open_sets(job: Job) -> Sets:
    """The job's prepared rows, memory-mapped."""
    without = Path(job.normal_without) if job.normal_without else None
    return Sets(
        forget=PreparedRows(Path(job.forget)) if job.forget else None,
        normal=PreparedRows(Path(job.normal), without) if job.normal else None,
        pool=PreparedRows(Path(job.random)) if job.random else None,
    )


def make_plan(job: Job, sets: Sets) -> Plan:
    """Which rows each step uses."""
    return Plan(
        seed=job.seed,
        batch_size=job.train.batch_size,
        forget=len(sets.forget) if sets.forget else 0,
        normal=len(sets.normal) if sets.normal else 0,
        pool=len(sets.pool) if sets.pool else 0,
        responses=job.objective.responses,
        by_row=job.responses_by_row,
    )


def total_steps(job: Job, plan: Plan) -> int:
    """Optimizer steps of the whole job."""
    return job.train.steps or job.train.epochs * plan.steps_per_epoch


def note(job: Job, event: str, text: str, **facts: Any) -> None:
    """Append to the job's events; for rank 0."""
    if job.events:
        append_line(Path(job.events), {"time": time.time(), "event": event, "text": text, **facts})
