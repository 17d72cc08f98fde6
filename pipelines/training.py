"""What the pipelines that train share: where checkpoints lie, and what is shown while training goes on."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from components.config import Recipe, Train
from components.data.locations import is_remote
from components.errors import Stopped
from components.tracking.follow import follow
from components.training.checkpoint_files import Place, steps_kept
from components.training.job import Job
from components.training.reference import needs, reference_pass
from pipelines.cli import Progress, absolute_folder, say


@contextmanager
def shown(job: Job) -> Iterator[None]:
    """Inside, each step and each event of `job` is printed as it comes."""
    assert job.events is not None
    progress = Progress(job.train.log_every)
    with (
        follow(Path(job.metrics), progress, after=_steps_done(job)),
        follow(Path(job.events), _say_all, after=None),
    ):
        yield


def _say_all(events: list[dict[str, Any]]) -> None:
    for event in events:
        say(f"  {datetime.fromtimestamp(event['time']):%H:%M:%S}  {event['text']}")


def _steps_done(job: Job) -> int:
    """Steps that are not done again, as far as can be told without looking into the checkpoint."""
    with suppress(OSError):  # a store out of reach is told by those who need it
        return max(steps_kept(Place(job.checkpoints)), default=0) if job.checkpoints else 0
    return 0


def checkpoint_place(train: Train, folder: Path, name: str) -> str:
    """Where the checkpoints of a job lie: `folder`, or under `name` where the recipe says."""
    if not train.checkpoint_storage:
        return str(folder)
    place = train.checkpoint_storage.rstrip("/")
    return f"{place}/{name}" if is_remote(place) else str(absolute_folder(place) / name)


def unlearning_job(
    recipe: Recipe, folder: Path, original: Path, rows: Mapping[str, str], made_from: dict[str, str], checkpoints: str
) -> Job:
    """What the recipe trains in `folder` from `original` on `rows` (`Streams.places`); without reference passes."""
    return Job(
        model=str(original),
        output=str(folder / "model"),
        metrics=str(folder / "metrics.jsonl"),
        events=str(folder / "events.jsonl"),
        stop=str(folder / "stop"),
        checkpoints=checkpoints,
        made_from=made_from,
        **rows,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        train=recipe.train,
        mask=recipe.mask,
        guards=recipe.guards,
        responses_by_row=recipe.data.responses == "by_row",
        seed=recipe.seed,
    )


def with_references(job: Job, original_hash: str, place: Path, tell: bool = False) -> Job:
    """The job with what the original says of the rows, made under `place` or found there."""
    references = {
        group: str(
            reference_pass(job, group, what, original_hash, place, telling(f"original on {group}") if tell else None)
        )
        for group, what in needs(job.objective).items()
    }
    return job.model_copy(update={"reference": references})


def forget_cache(place: Path) -> None:
    """Remove what was made from rows under `place`, as for `data.cache: false`."""
    for name in ("prepared", "reference", "overlap", "fingerprints"):
        shutil.rmtree(place / name, ignore_errors=True)


def say_stopped(outcome: dict[str, Any]) -> None:
    """End as asked by a signal that came too late to stop the training.

    Raises:
        Stopped: when there was one.
    """
    if outcome["signal"]:
        raise Stopped("Stopped; training is done, the same command goes on with what comes after.", outcome["signal"])


def telling(name: str) -> Callable[[str], None]:
    """What prints lines of progress under a name."""
    return lambda line: say(f"  {name:<10} {line}")
