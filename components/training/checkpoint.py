"""Checkpoints: all that decides the next step, written by any ranks and ZeRO stage, read by any others.

Each rank writes a safetensors file with its fragments of weights (fp32 masters), optimizer state and masks, each named
`<parameter>@<first number>.<what>`, and reads the fragments that it needs, whoever wrote them. `state.json` holds what
is the same on all ranks. Data order and every random draw follow from seed and step number, which are therefore their
whole state.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from components.config import NOT_PART_OF_TRAINING, differences
from components.errors import ConfigError, StorageError
from components.objectives.weights import Learnt
from components.training import checkpoint_files as files
from components.training.checkpoint_files import Damaged, Place
from components.training.engine import Outputs, backward, optimizer_parameters, visit_gradients
from components.training.job import Job
from components.training.layout import Fragment, fragments
from components.training.passes import Setup

_WHOLE = "whole-"  # marks what is not one number for each of a parameter's


class Course(NamedTuple):
    """Where training stands between two steps."""

    step: int
    """Steps done."""
    learnt: Learnt
    """Dual variables and balanced weights."""
    seen: dict[str, int]
    """The last step after which each guard's metric was seen within its bounds."""
    since_refresh: int | None = None
    """Steps since the Hessian was refreshed; None before the first time."""
    clip_fraction: float | None = None
    """SOUL's share of clipped coordinates in the last step."""
    bad_steps: int = 0
    """Steps left out so far because their numbers were not finite."""
    collapsed: int = 0
    """Steps in a row, up to this one, after which the model answered normal rows worse than by guessing."""
    normal_loss_at_start: float | None = None
    """Of the first step that measured it."""


def gathered(value: Any, setup: Setup) -> list[Any]:
    """Each rank's `value`. A collective."""
    found: list[Any] = [None] * setup.batcher.world
    torch.distributed.all_gather_object(found, value)
    return found


def resume(setup: Setup, place: Place, at_most: int | None = None) -> tuple[Course | None, list[str]]:
    """Put the newest whole checkpoint, not after step `at_most`, into the engine. A collective.

    Returns where it leaves off, None when there is none, and lines to tell: damaged ones that were set aside, and what
    is different now.

    Raises:
        ConfigError: when it is of another job: other settings, models or rows.
        StorageError: on all ranks alike, when it cannot be read.
    """
    told: list[str] = []
    listed = files.steps_kept(place) if setup.batcher.rank == 0 else None
    for step in gathered(listed, setup)[0]:
        if at_most is not None and step > at_most:
            continue
        with tempfile.TemporaryDirectory() as into:
            problem, unread, saved = None, None, None
            try:
                saved = _Saved(setup, place, step, Path(into))
            except Damaged as error:
                problem = str(error)
            except Exception as error:  # the store cannot be reached, no room to fetch it: no fault of the checkpoint
                unread = f"{type(error).__name__}: {error}"
            problems, unreads = ([text for text in gathered(t, setup) if text] for t in (problem, unread))
            if unreads:
                raise StorageError(
                    f"Checkpoint cannot be read (path={place.path(step)}): {unreads[0]}. Expected the store within "
                    "reach and room in the temporary folder. It is left as it is; give the same command again."
                )
            if not problems:
                assert saved is not None
                _check_same_job(setup.job, saved.state, place.path(step))
                if changed := differences(saved.state["split"], split_of(setup)):
                    told.append(f"{', '.join(changed)}; the result is equal up to the order of sums, not to the bit")
                return _load(setup, saved), told
        if setup.batcher.rank == 0:
            files.set_aside(place, step)
        told.append(f"checkpoint of step {step} is damaged and set aside: {problems[0]}")
    return None, told


def described(job: Job) -> dict[str, Any]:
    """What a job must have in common with the one whose checkpoint it goes on from."""
    described = job.model_dump(
        mode="json", include={"objective", "optimizer", "train", "mask", "guards", "seed", "responses_by_row"}
    )
    described["train"] = {key: v for key, v in described["train"].items() if key not in NOT_PART_OF_TRAINING}
    return {**described, "made_from": dict(job.made_from)}


def _check_same_job(job: Job, state: dict[str, Any], where: str) -> None:
    if changed := differences(state["job"], described(job)):
        raise ConfigError(
            f"Checkpoint is of another job (path={where}; {'; '.join(changed)}). Expected the same settings, model and "
            "rows. Put back what was changed, or set if_exists=new to start anew beside it."
        )


def split_of(setup: Setup) -> dict[str, Any]:
    """How the work is split, which decides the order of sums."""
    train = setup.job.train
    return {
        "workers": setup.batcher.world, "train.zero_stage": train.zero_stage,
        "train.micro_batch_size": train.micro_batch_size, "train.packing": train.packing,
    }  # fmt: skip


def _load(setup: Setup, saved: "_Saved") -> Course:
    """Put the checkpoint's numbers into the engine and its optimizer."""
    state, parameters = saved.state, optimizer_parameters(setup.engine)
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


def tensors_of(setup: Setup) -> Iterator[tuple[str, Tensor]]:
    """(name, numbers) of every fragment that this rank saves; at stage 0, where all have the same, rank 0 does."""
    if setup.job.train.zero_stage == 0 and setup.batcher.rank:
        return
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


def scalars_of(setup: Setup) -> dict[str, Any]:
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
    file: str
    name: str


class _Saved:
    """The fragments of a checkpoint that this rank needs, by parameter and kind, read as they are needed.

    Raises:
        Damaged: when a file is not as the manifest says.
    """

    def __init__(self, setup: Setup, place: Place, step: int, into: Path):
        listed = files.manifest(place, step)["files"]
        self._places: dict[tuple[str, str], list[_Interval]] = {}
        for file, about in listed.items():
            for name, length in about.get("tensors", {}).items():
                parameter, _, rest = name.rpartition("@")
                start, _, what = rest.partition(".")
                self._places.setdefault((parameter, what), []).append(_Interval(int(start), length, file, name))
        self.state = json.loads(
            files.fetch(place, step, "state.json", listed["state.json"], into).read_text(encoding="utf-8")
        )
        self._files = {
            file: safe_open(files.fetch(place, step, file, listed[file], into), "pt")
            for file in sorted(self._needed(fragments(setup.engine)))
        }

    def _needed(self, own: list[Fragment]) -> set[str]:
        """Files with numbers of `own`."""
        needed = set()
        for fragment in own:
            for what in self.kinds([fragment]):
                needed |= {saved.file for saved, *_ in self._overlaps(fragment, what)}
        return needed

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
        for saved, first, last in self._overlaps(fragment, what):
            numbers = self._files[saved.file].get_slice(saved.name)[first - saved.start : last - saved.start]
            yield first - fragment.start, numbers

    def _overlaps(self, fragment: Fragment, what: str) -> Iterator[tuple[_Interval, int, int]]:
        """(saved, first, last number of the parameter in both)."""
        end = fragment.start + fragment.length
        for saved in self._places[fragment.name, what]:
            first, last = max(fragment.start, saved.start), min(end, saved.start + saved.length)
            if first < last or what.startswith(_WHOLE):
                yield saved, first, last


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
