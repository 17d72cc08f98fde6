"""Writing checkpoints while training goes on."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.errors import StorageError
from components.training import checkpoint_files as files
from components.training.checkpoint import Course, described, gathered, scalars_of, split_of, tensors_of
from components.training.checkpoint_files import Place
from components.training.guards import last_good
from components.training.passes import Setup

_GRACE = 20.0  # seconds
_PATIENCE = 3600.0  # seconds that rank 0 waits for the other ranks' files: a slow store is no reason to give up


class Saving:
    """Writes checkpoints in a thread, at most one at a time, while training goes on."""

    def __init__(self, setup: Setup, place: Place, mark: str):
        self._setup, self._place, self._mark = setup, place, mark
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, course: Course, score: float | None) -> None:
        """Copy the state and write it behind the scenes.

        Raises:
            StorageError: on all ranks alike, when the checkpoint before could not be written.
        """
        self.finish()
        tensors = dict(self._copied())
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)
        state = {
            "course": course._asdict(), "scalars": scalars_of(self._setup), "world": self._setup.batcher.world,
            "job": described(self._setup.job), "split": split_of(self._setup), "score": score, "time": time.time(),
        }  # fmt: skip
        self._thread = threading.Thread(target=self._write, args=(course, tensors, state), daemon=True)
        self._thread.start()

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. A collective: every rank must call it.

        Raises:
            StorageError: on all ranks alike, when one of them could not write.
        """
        wait_for(self._thread, self._setup)
        self._thread = None
        failures = [str(e) for e in gathered(self._error, self._setup) if e]
        if failures:
            raise StorageError(failures[0]) from self._error

    def settle(self) -> None:
        """After an error: let what is being written come to its end, unless it waits for a rank that is no more."""
        if self._thread:
            self._thread.join(_GRACE)

    def _copied(self) -> Iterator[tuple[str, Tensor]]:
        """Copies in the CPU's memory, the same memory each time: to get it anew costs ten times the copying."""
        for name, tensor in tensors_of(self._setup):
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape:
                pinned = tensor.device.type == "cuda"
                copy = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            yield name, copy.copy_(tensor.detach(), non_blocking=True)

    def _write(self, course: Course, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        rank, job = self._setup.batcher.rank, self._setup.job
        try:
            _write(self._place, self._mark, course.step, rank, tensors, state)
            if rank == 0:
                best = job.train.checkpoint_best
                good = last_good(job.guards, course.seen) if job.guards else None
                with suppress(OSError):  # the new one is whole; the old ones go with the next
                    files.prune(self._place, job.train.keep_checkpoints, best.mode if best else None, good)
        except Exception as error:
            self._error = error
            with suppress(Exception):  # rank 0 need not wait for it
                files.write_text(
                    self._place, course.step, _receipt(rank, self._mark), json.dumps({"error": str(error)})
                )


def wait_for(thread: threading.Thread | None, setup: Setup) -> None:
    """Until no rank's thread works any more, however long that takes: in exchanges far shorter than a timeout.

    A collective.
    """
    while True:
        if thread:
            thread.join(1.0)
        if not any(gathered(thread is not None and thread.is_alive(), setup)):
            return


def alone(setup: Setup, work: Callable[[], None] | None) -> None:
    """Do `work` on the rank that has some, while the others wait. A collective.

    Raises:
        StorageError: on all ranks alike, when it failed.
    """
    failed: list[str] = []

    def run() -> None:
        try:
            assert work is not None
            work()
        except Exception as error:
            failed.append(str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run) if work else None
    if thread:
        thread.start()
    wait_for(thread, setup)
    if told := [text for texts in gathered(failed, setup) for text in texts]:
        raise StorageError(told[0])


def check_room(setup: Setup, place: Place) -> None:
    """Refuse to start what could not be saved: room is needed for those kept and the one being written.

    Raises:
        StorageError: with the bytes needed and free.
    """
    if place.remote:
        return
    train = setup.job.train
    kept = 1 if train.checkpoint_every is None else 1 + train.keep_checkpoints
    kept += bool(train.checkpoint_best) + bool(setup.job.guards)
    one, free = checkpoint_bytes(setup), files.free_for(place)
    if one * kept > free:
        raise StorageError(
            f"Checkpoints would not fit (path={place.url}, bytes needed={one * kept:,} for {kept} of {one:,}, "
            f"bytes free={free:,}). Expected room for those that are kept and the one being written. Make room, lower "
            "train.keep_checkpoints, or set train.checkpoint_storage or storage to another place."
        )


def checkpoint_bytes(setup: Setup) -> int:
    """Estimated size over all ranks: fp32 weights and what the optimizer keeps of each, and the mask's bytes."""
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in setup.engine.module.parameters() if p.requires_grad)
    kept = {"soul": 2, "adamw": 2, "influence": 2, "sgd": 1, "lion": 1, "adafactor": 0}[setup.job.optimizer.type]
    return numbers * (4 * (1 + kept) + (1 if setup.job.mask else 0))


def _write(place: Place, mark: str, step: int, rank: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """This rank's file, then its receipt; rank 0 waits for all receipts and makes the checkpoint whole."""
    name = f"rank-{rank:04d}-{mark}.safetensors"
    needed = sum(tensor.nbytes for tensor in tensors.values())
    about = files.write(place, step, name, lambda file: save_file(tensors, file), needed)
    lengths = {name: tensor.shape[0] for name, tensor in tensors.items()}
    receipt = {"file": name, "about": {**about, "tensors": lengths}}
    files.write_text(place, step, _receipt(rank, mark), json.dumps(receipt))
    if rank:
        return
    listed = {"state.json": files.write_text(place, step, "state.json", json.dumps(state))}
    for other in range(state["world"]):
        theirs = json.loads(files.await_text(place, step, _receipt(other, mark), _PATIENCE))
        if "error" in theirs:
            raise StorageError(theirs["error"])
        listed[theirs["file"]] = theirs["about"]
    whole = {"step": step, "score": state["score"], "files": listed}
    files.write_text(place, step, files.MANIFEST, json.dumps(whole))


def _receipt(rank: int, mark: str) -> str:
    return f"rank-{rank:04d}-{mark}.json"
