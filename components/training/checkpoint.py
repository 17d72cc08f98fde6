"""Checkpoints: all that decides the next step, in safetensors, whole or absent.

`<folder>/step-000030/` holds for each rank a file with its fragments of weights (fp32 masters), optimizer state and
masks, each named `<parameter>@<first number>.<what>`, so that any ZeRO stage and any number of workers can read it;
`state.json`; and `manifest.json` with the size and sha256 of every file. A folder without a fitting manifest counts as
none. Data order and every random draw follow from the step number, which is therefore their whole state.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.errors import TrainingError
from components.files import write_whole
from components.objectives.weights import Learnt
from components.training.engine import Outputs, backward, optimizer_parameters, visit_gradients
from components.training.layout import Fragment, fragments
from components.training.passes import Setup

_PATIENCE = 600.0  # seconds that rank 0 waits for the other ranks' files


_WHOLE = "whole-"  # marks what is not one number for each of a parameter's


class Course(NamedTuple):
    """Where training stands between two steps."""

    step: int
    """Steps done."""
    learnt: Learnt
    """Dual variables and balanced weights."""
    since_refresh: int | None
    """Steps since the Hessian was refreshed; None before the first time."""
    clip_fraction: float | None
    """SOUL's share of clipped coordinates in the last step."""


class Saving:
    """Writes checkpoints in a thread, at most one at a time, while training goes on."""

    def __init__(self, setup: Setup, folder: Path, keep: int):
        self._setup, self._folder, self._keep = setup, folder, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, course: Course) -> None:
        """Copy the state and write it behind the scenes.

        Raises:
            TrainingError: when the checkpoint before could not be written.
        """
        self.finish()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(self._setup)}
        state = {"course": course._asdict(), "scalars": _scalars(self._setup), "world": self._setup.batcher.world}
        self._thread = threading.Thread(target=self._write, args=(course.step, tensors, state), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. A collective: every rank must call it.

        Raises:
            TrainingError: on all ranks alike, when one of them could not write.
        """
        if self._thread:
            self._thread.join()
        self._thread = None
        failed = torch.tensor(float(self._error is not None), device=self._setup.device)
        torch.distributed.all_reduce(failed)
        if failed:
            raise TrainingError(
                f"Checkpoint cannot be written (folder={self._folder}): {self._error or 'another rank failed'}. "
                "Expected space and the right to write. Earlier checkpoints are whole; make room and give the same "
                "command again."
            ) from self._error

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            _write(self._folder, step, self._setup.batcher.rank, tensors, state)
            if self._setup.batcher.rank == 0:
                _prune(self._folder, self._keep)
        except Exception as error:
            self._error = error
            with suppress(OSError):
                receipt = self._folder / f"step-{step:06d}.partial" / f"rank-{self._setup.batcher.rank:04d}.json"
                receipt.write_text(json.dumps({"error": str(error)}))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are set aside as `….damaged`."""
    for found in sorted(folder.glob("step-*[0-9]"), reverse=True):
        if _is_whole(found):
            return found
        os.rename(found, found.with_name(f"{found.name}.damaged"))
    return None


def clear_partial(folder: Path) -> None:
    """Remove what a run that was stopped while writing left behind."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def load(setup: Setup, checkpoint: Path) -> Course:
    """Put the checkpoint's numbers into the engine and its optimizer, whatever ranks and stage wrote them."""
    state = json.loads((checkpoint / "state.json").read_text())
    parameters = optimizer_parameters(setup.engine)
    saved = _Saved(checkpoint)
    own = fragments(setup.engine)
    for piece, p in enumerate(parameters):
        mine = [fragment for fragment in own if fragment.piece == piece]
        for what in saved.kinds(mine):
            if not what.startswith(_WHOLE):
                _fill(saved, mine, what, _target(setup, piece, p, what))
            elif (tensor := saved.whole(mine[0].name, what)) is not None:
                setup.optimizer.state[p][what.removeprefix(_WHOLE)] = tensor.to(p.device)
        for key, (value, is_tensor) in state["scalars"]["parameters"].items():
            setup.optimizer.state[p][key] = torch.tensor(value) if is_tensor else value
    for group, scalars in zip(setup.optimizer.param_groups, state["scalars"]["groups"], strict=True):
        group.update(scalars)
    _spread(setup)
    return Course(**state["course"])


def _tensors(setup: Setup) -> Iterator[tuple[str, Tensor]]:
    """(name, numbers) of every fragment on this rank."""
    parameters = optimizer_parameters(setup.engine)
    for fragment in fragments(setup.engine):
        p = parameters[fragment.piece]
        here = slice(fragment.offset, fragment.offset + fragment.length)
        found = {"weights": p.data, **setup.optimizer.state[p]}
        if setup.masks is not None:
            found["mask"] = setup.masks[fragment.piece]
        for what, tensor in found.items():
            if isinstance(tensor, Tensor) and tensor.shape == p.shape:
                yield f"{fragment.name}@{fragment.start}.{what}", tensor.flatten()[here]
            elif isinstance(tensor, Tensor) and tensor.ndim:  # Adafactor's rows and columns, at stage 0
                yield f"{fragment.name}@0.{_WHOLE}{what}", tensor


def _scalars(setup: Setup) -> dict[str, Any]:
    """Single numbers of the optimizer's state, such as its step count; the same for all parameters."""
    [first, *_] = optimizer_parameters(setup.engine)
    single = {}
    for key, value in setup.optimizer.state[first].items():
        if isinstance(value, Tensor) and not value.ndim:
            single[key] = (value.item(), True)
        elif isinstance(value, int | float):
            single[key] = (value, False)
    groups = [
        {key: value for key, value in group.items() if isinstance(value, int | float)}
        for group in setup.optimizer.param_groups
    ]
    return {"parameters": single, "groups": groups}


def _target(setup: Setup, piece: int, p: Any, what: str) -> Tensor:
    if what == "weights":
        return p.data
    if what == "mask":
        assert setup.masks is not None
        return setup.masks[piece]
    state = setup.optimizer.state[p]
    if what not in state:
        state[what] = torch.zeros_like(p.data)
    return state[what]


class _Interval(NamedTuple):
    start: int
    length: int
    file: Path
    name: str


class _Saved:
    """The fragments of a checkpoint, by parameter and kind, read as they are needed."""

    def __init__(self, checkpoint: Path):
        self._places: dict[tuple[str, str], list[_Interval]] = {}
        self._files = {file: safe_open(file, "pt") for file in sorted(checkpoint.glob("rank-*.safetensors"))}
        for file, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118
                parameter, _, rest = name.rpartition("@")
                start, _, what = rest.partition(".")
                length = opened.get_slice(name).get_shape()[0]
                self._places.setdefault((parameter, what), []).append(_Interval(int(start), length, file, name))

    def kinds(self, own: list[Fragment]) -> list[str]:
        """What was saved of the parameters of `own`."""
        names = {fragment.name for fragment in own}
        return sorted({what for name, what in self._places if name in names})

    def whole(self, parameter: str, what: str) -> Tensor | None:
        """A tensor that is not made of one number for each of the parameter's."""
        places = self._places.get((parameter, what))
        return self._files[places[0].file].get_tensor(places[0].name) if places else None

    def overlapping(self, fragment: Fragment, what: str) -> Iterator[tuple[int, Tensor]]:
        """(place within the fragment, numbers)."""
        end = fragment.start + fragment.length
        for saved in self._places[fragment.name, what]:
            first, last = max(fragment.start, saved.start), min(end, saved.start + saved.length)
            if first < last:
                numbers = self._files[saved.file].get_slice(saved.name)[first - saved.start : last - saved.start]
                yield first - fragment.start, numbers


def _fill(saved: _Saved, own: list[Fragment], what: str, target: Tensor) -> None:
    flat = target.view(-1)
    for fragment in own:
        for place, numbers in saved.overlapping(fragment, what):
            first = fragment.offset + place
            flat[first : first + len(numbers)].copy_(numbers)


def _spread(setup: Setup) -> None:
    """From ZeRO's fp32 masters to the weights that the forward pass uses: a step that updates nothing."""
    ids, nowhere = torch.zeros(1, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    with visit_gradients(setup.engine, lambda p: None, "nothing"):
        outputs: Outputs = setup.engine(ids.to(setup.device), nowhere.to(setup.device))
        backward(setup.engine, outputs.nothing(), last=True)


def _write(folder: Path, step: int, rank: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """This rank's file, then its receipt; rank 0 waits for all receipts and makes the folder whole."""
    partial = folder / f"step-{step:06d}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / f"rank-{rank:04d}.safetensors"
    save_file(tensors, file)
    _sync(file)
    receipt = {"size": file.stat().st_size, "sha256": _sha256(file)}
    write_whole(partial / f"rank-{rank:04d}.json", json.dumps(receipt))
    if rank:
        return
    write_whole(partial / "state.json", json.dumps(state))
    _sync(partial / "state.json")
    files = {"state.json": {"size": (partial / "state.json").stat().st_size, "sha256": _sha256(partial / "state.json")}}
    deadline = time.monotonic() + _PATIENCE
    for other in range(state["world"]):
        theirs = partial / f"rank-{other:04d}.json"
        while not theirs.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {other} wrote nothing within {_PATIENCE:g} s")
            time.sleep(0.02)
        about = json.loads(theirs.read_text())
        if "error" in about:
            raise OSError(f"rank {other}: {about['error']}")
        files[f"rank-{other:04d}.safetensors"] = about
    write_whole(partial / "manifest.json", json.dumps(files))
    _sync(partial / "manifest.json")
    os.rename(partial, folder / f"step-{step:06d}")
    _sync(folder)


def _is_whole(checkpoint: Path) -> bool:
    manifest = checkpoint / "manifest.json"
    if not manifest.exists():
        return False
    return all(
        (checkpoint / name).is_file()
        and (checkpoint / name).stat().st_size == about["size"]
        and _sha256(checkpoint / name) == about["sha256"]
        for name, about in json.loads(manifest.read_text()).items()
    )


def _prune(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
