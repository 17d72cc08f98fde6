"""How busy the machines are while a job trains: a line every few seconds for each node."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from components.files import append_line, read_lines
from components.process import in_background

_EVERY = 10.0  # seconds


@contextmanager
def watched(folder: str | None, node: int) -> Iterator[None]:
    """Inside, a thread adds lines to `<folder>/node<node>.jsonl`, named as MLflow names system metrics."""
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / f"node{node}.jsonl"

    def run(done: threading.Event) -> None:
        psutil.cpu_percent()  # the first answer is about nothing, later ones about the time since
        number = len(read_lines(file))
        last = False
        while not last:
            last = done.wait(_EVERY if number else 0.5)
            with suppress(OSError):  # a full disk ends nothing here
                append_line(file, {"time": time.time(), "step": number, **_sample(node, folder)})
            number += 1

    with in_background(run, "system"):
        yield


def _sample(node: int, folder: str) -> dict[str, float]:
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / 1e6,
        "disk_usage_percentage": psutil.disk_usage(folder).percent,
    }
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        free, total = torch.cuda.mem_get_info(gpu)
        found[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (1 - free / total)
    return {f"system/node{node}/{name}": value for name, value in found.items()}
