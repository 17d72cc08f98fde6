"""Which rows belong to which step: pure functions of (seed, row counter), so that nothing depends on who asks.

One stream paces: each of its rows is used once an epoch, in an order drawn from (seed, epoch), the last partial batch
included. The i-th paced row is joined by row i of the cycling normal stream and by K random responses. The global
batch of a step is therefore the same for any number of ranks and micro-batches, and the position of every stream is
the step number alone: to save it is to save one number, to restore it costs nothing.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

_TABLE = 1 << 22  # rows up to which an epoch's order is kept as a table
_ROUNDS = 8


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
    by_row: bool = False
    """Forget row i is answered by row i of the pool, in place of rows drawn from it."""

    @property
    def paced(self) -> int:
        return self.forget or self.normal

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.paced / self.batch_size)

    def normal_rows(self, steps: int) -> np.ndarray:
        """The normal rows that the first `steps` steps use, sorted: all that a reference pass must cover."""
        if not self.normal:
            return np.empty(0, dtype=np.int64)
        last = self._counter(steps - 1)[-1] + 1 if steps else 0
        if last >= self.normal:
            return np.arange(self.normal)
        return np.sort(_cycle(self.seed, "normal", self.normal, np.arange(last)))

    def _counter(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        within = np.arange(place * self.batch_size, min((place + 1) * self.batch_size, self.paced))
        return epoch * self.paced + within

    def step_rows(self, step: int) -> StepRows:
        """Rows of `step`, counted from 0."""
        counter = self._counter(step)
        nothing = np.empty(0, dtype=np.int64)
        forget = _cycle(self.seed, "forget", self.forget, counter) if self.forget else nothing
        return StepRows(
            forget=forget,
            normal=_cycle(self.seed, "normal", self.normal, counter) if self.normal else nothing,
            random=forget[:, None] if self.by_row and self.pool else self._drawn(counter),
            counter=counter,
        )

    def _drawn(self, counter: np.ndarray) -> np.ndarray:
        """[n, K] rows of the pool for each paced row."""
        draws = [
            draw(self.seed, "random", int(i)).integers(self.pool, size=self.responses) for i in counter if self.pool
        ]
        return np.array(draws, dtype=np.int64).reshape(len(draws), self.responses)


def draw(seed: int, purpose: str, counter: int) -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox keyed by (seed, purpose), started at `counter`."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, name], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, counter, 0]))


def _cycle(seed: int, name: str, size: int, counter: np.ndarray) -> np.ndarray:
    """Elements `counter` of the endless sequence of epochs, each in a fresh order of the `size` rows."""
    epochs, places = np.divmod(counter, size)
    out = np.empty(len(counter), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        if size <= _TABLE:
            out[here] = _permutation(seed, name, int(epoch), size)[places[here]]
        else:
            out[here] = _scatter(seed, name, int(epoch), size, places[here])
    return out


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, name: str, epoch: int, size: int) -> np.ndarray:
    return draw(seed, name + "-order", epoch).permutation(size)


def _scatter(seed: int, name: str, epoch: int, size: int, places: np.ndarray) -> np.ndarray:
    """A permutation of range(size) that is computed where it is asked: no table of a huge set's order in memory.

    A Feistel network on twice as many bits as half the index needs; what falls outside the range is sent through again.
    """
    half = np.uint64((max(2, (size - 1).bit_length()) + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = draw(seed, name + "-order", epoch).integers(2**63, size=_ROUNDS, dtype=np.uint64)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        out[outside] = left << half | right
        outside = out >= size
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
