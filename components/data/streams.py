"""Which rows belong to which step: pure functions of (seed, row counter), so that nothing depends on who asks.

One stream paces: each of its rows is used once an epoch, in an order drawn from (seed, epoch), the last partial batch
included. The i-th paced row is joined by row i of the cycling normal stream and by K random responses. The global
batch of a step is therefore the same for any number of ranks and micro-batches, and the position of every stream is
the step number alone.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np


class StepRows(NamedTuple):
    """Row indices of one step's global batch (all ranks)."""

    forget: np.ndarray
    """[n] indices into the forget set; empty when normal paces."""
    normal: np.ndarray
    """[n] indices into the normal set; empty without a normal term."""
    random: np.ndarray
    """[n, K] indices into the pool of answers."""
    counter: np.ndarray
    """[n] number of each paced row since the start of training: the key of every random draw for it."""


class Plan(NamedTuple):
    """Sizes of the three sets and the batch; a set that is not used has size 0."""

    seed: int
    batch_size: int
    forget: int
    normal: int
    pool: int
    responses: int

    @property
    def paced(self) -> int:
        return self.forget or self.normal

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.paced / self.batch_size)

    def step_rows(self, step: int) -> StepRows:
        """Rows of `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        within = np.arange(place * self.batch_size, min((place + 1) * self.batch_size, self.paced))
        counter = epoch * self.paced + within
        nothing = np.empty(0, dtype=np.int64)
        draws = [
            draw(self.seed, "random", int(i)).integers(self.pool, size=self.responses) for i in counter if self.pool
        ]
        return StepRows(
            forget=_cycle(self.seed, "forget", self.forget, counter) if self.forget else nothing,
            normal=_cycle(self.seed, "normal", self.normal, counter) if self.normal else nothing,
            random=np.array(draws, dtype=np.int64).reshape(len(draws), self.responses),
            counter=counter,
        )


def draw(seed: int, purpose: str, counter: int) -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox keyed by (seed, purpose), started at `counter`."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, name], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, counter, 0]))


def _cycle(seed: int, name: str, size: int, counter: np.ndarray) -> np.ndarray:
    """Element `counter` of the endless sequence of epochs, each a fresh permutation."""
    return np.array([_permutation(seed, name, int(i) // size, size)[int(i) % size] for i in counter], dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, name: str, epoch: int, size: int) -> np.ndarray:
    return draw(seed, name + "-order", epoch).permutation(size)
