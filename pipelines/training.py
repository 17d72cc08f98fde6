"""What the pipelines that train share: where checkpoints lie, and what is shown while training goes on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from components.config import Train
from components.tracking.follow import follow
from components.training.job import Job
from pipelines.cli import Progress, say


@contextmanager
def shown(job: Job) -> Iterator[None]:
    """Inside, each step and each event of `job` is printed as it comes."""
    metrics = Path(job.metrics)
    events = Path(job.events or metrics.with_suffix(".events"))
    with follow(metrics, Progress(job.train.log_every), after=_steps_done(job)), follow(events, _say_all, after=None):
        yield


def _say_all(events: list[dict[str, Any]]) -> None:
    for event in events:
        say(f"  {datetime.fromtimestamp(event['time']):%H:%M:%S}  {event['text']}")


def _steps_done(job: Job) -> int:
    """Steps that are not done again, as far as can be told without looking into the checkpoint."""
    from components.training.checkpoint_files import Place, steps_kept

    kept = steps_kept(Place(job.checkpoints)) if job.checkpoints else []
    return kept[0] if kept else 0


def checkpoint_place(train: Train, folder: Path, name: str) -> str:
    """Where the checkpoints of the job `name` lie."""
    return f"{train.checkpoint_storage.rstrip('/')}/{name}" if train.checkpoint_storage else str(folder)


def read_events(file: Path) -> list[dict[str, Any]]:
    """The lines of an events.jsonl."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def telling(name: str) -> Callable[[str], None]:
    """What prints lines of progress under a name."""
    return lambda line: say(f"  {name:<10} {line}")
