"""Follow a metrics.jsonl while it grows: training writes to a file and never waits for whoever reads it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]


@contextmanager
def follow(file: Path, consume: Callable[[Lines], None], interval: float = 0.5) -> Iterator[list[Exception]]:
    """Hand new whole lines to `consume` in a thread, the rest on leaving.

    Yields the list of exceptions that `consume` raised; after one it is not called again, and the block goes on.
    """
    failures: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        offset = 0
        while True:
            last = done.is_set()
            offset, lines = _new_lines(file, offset)
            if lines and not failures:
                try:
                    consume(lines)
                except Exception as error:
                    failures.append(error)
            if last:
                return
            done.wait(interval)

    thread = threading.Thread(target=run, name=f"follow-{file.name}", daemon=True)
    thread.start()
    try:
        yield failures
    finally:
        done.set()
        thread.join()


def _new_lines(file: Path, offset: int) -> tuple[int, Lines]:
    if not file.exists():
        return offset, []
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]  # a line that is still being written is left for later
    return offset + len(whole), [json.loads(line) for line in whole.splitlines()]
