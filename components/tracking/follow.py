"""Follow a metrics.jsonl while it grows: training writes to a file and never waits for whoever reads it."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from components.files import lines_after
from components.process import in_background

Lines = list[dict[str, Any]]


@contextmanager
def follow(
    file: Path, consume: Callable[[Lines], None], interval: float = 0.5, after: int | None = 0
) -> Iterator[list[Exception]]:
    """Hand new whole lines to `consume` in a thread, the rest on leaving: each step once, from step `after` + 1 on.

    A run that goes on from a checkpoint puts a shorter file in place of the old one and does some steps again. With
    None for `after`, lines are no steps, and those that stand there already are not handed over.

    Lines that `consume` fails to take are handed to it again. Yields the list of the exceptions that it raised; the
    block goes on whatever they are.
    """
    failures: list[Exception] = []
    start = _new_lines(file, _Place(0, 0))[0] if after is None else _Place(0, 0)

    def run(done: threading.Event) -> None:
        place, step = start, after
        while True:
            last = done.is_set()
            try:
                new_place, lines = _new_lines(file, place)
                if step is not None:
                    lines = [line for line in lines if line["step"] > step]
                if lines:
                    consume(lines)
                place, step = new_place, None if step is None else max([step, *(line["step"] for line in lines)])
            except Exception as error:  # the lines are handed over again
                failures.append(error)
            if last:
                return
            done.wait(interval)

    with in_background(run, f"follow-{file.name}"):
        yield failures


class _Place(NamedTuple):
    file: int
    """Its inode."""
    offset: int


def _new_lines(file: Path, place: _Place) -> tuple[_Place, Lines]:
    if not file.exists():
        return place, []
    with file.open("rb") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        offset = place.offset if inode == place.file else 0
        found = list(lines_after(stream, offset))
    return _Place(inode, found[-1][1] if found else offset), [line for line, _ in found]
