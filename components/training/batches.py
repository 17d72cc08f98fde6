"""Rows of one step → the tensors of one rank's micro-batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.data.rows import PreparedRows
from components.data.streams import Plan, StepRows, draw
from components.training.reference import Reference


class Answers(NamedTuple):
    """The answer tokens of one group's rows in a micro-batch, flattened in row order."""

    first: int
    """Place of the group's first token among the micro-batch's answer tokens."""
    targets: Tensor
    """[n] token ids."""
    mask: Tensor
    """[rows, longest] 1.0 on answer tokens; `mask.bool()` scatters flat values back to rows."""
    original: Tensor | None = None
    """[n, hidden size] the original model's last hidden states, or the outputs of its layer that a term takes."""
    original_logp: Tensor | None = None
    """[n] log-probabilities that the original model gives the targets."""
    uniforms: Tensor | None = None
    """[n] numbers in [0, 1) for sampling labels, the same on any rank."""

    def padded(self, flat: Tensor) -> Tensor:
        """[n] → [rows, longest], 0 where there is no token."""
        return torch.zeros_like(self.mask, dtype=flat.dtype).masked_scatter(self.mask.bool(), flat)


class MicroBatch(NamedTuple):
    """One forward pass: all groups' rows together, so that ZeRO-3 gathers each layer once."""

    input_ids: Tensor
    """[rows, longest] right-padded with 0: under causal attention padding behind an answer cannot reach it."""
    position_ids: Tensor | None
    """[rows, longest] starting at 0 with each sequence, where several share a row (packing); else None."""
    positions: Tensor
    """[n] flat places in `input_ids` whose output predicts an answer token."""
    groups: dict[str, Answers]
    tokens: int
    """Input tokens without padding."""


class Pair(NamedTuple):
    """One prompt with one answer of a micro-batch."""

    group: str
    prompt: np.ndarray
    answer: np.ndarray
    counter: int
    """The paced row that it belongs to: seeds every draw for it."""
    key: int
    """Its key in the group's reference."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Batcher(NamedTuple):
    """Everything needed to build micro-batches of any step, for one rank."""

    plan: Plan
    forget: PreparedRows | None
    normal: PreparedRows | None
    pool: PreparedRows | None
    references: dict[str, Reference]
    """The original model's word on the groups whose terms need it."""
    micro_batch_size: int
    packing: bool
    rank: int
    world: int

    def counts(self, rows: StepRows) -> dict[str, int]:
        """Answer tokens of each group, and its rows as `<group>_rows`, over all ranks and micro-batches.

        What each term is divided by.
        """
        sets = (
            ("forget", self.forget, rows.forget),
            ("random", self.pool, rows.random),
            ("normal", self.normal, rows.normal),
        )
        tokens = {group: sum(own.lengths(i)[1] for i in chosen.flat) if own else 0 for group, own, chosen in sets}
        return tokens | {f"{group}_rows": chosen.size for group, _, chosen in sets}

    def share(self, rows: StepRows) -> np.ndarray:
        """Places in the step's batch that this rank takes, longest first.

        Rows are dealt out by length, so that all ranks have about as much to do and rows of a micro-batch are alike.
        """
        return np.argsort(-self._longest(rows), kind="stable")[self.rank :: self.world]

    def micro_batches(
        self, rows: StepRows, groups: tuple[str, ...], labels_key: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's share, in as many micro-batches as every other rank has, empty ones included.

        `labels_key` seeds uniforms for label sampling.
        """
        mine = self.share(rows)
        count = math.ceil(math.ceil(len(rows.counter) / self.world) / self.micro_batch_size)
        for k in range(count):
            part = mine[k * self.micro_batch_size : (k + 1) * self.micro_batch_size]
            yield self._assemble(self._sequences(rows, part, groups), groups, labels_key)

    def _longest(self, rows: StepRows) -> np.ndarray:
        """[n] tokens of the longest sequence that belongs to each place of the batch."""
        longest = np.zeros(len(rows.counter), dtype=np.int64)
        for j in range(len(longest)):
            prompt, answer = self.forget.lengths(rows.forget[j]) if self.forget else (0, 0)
            drawn = max((self.pool.lengths(i)[1] for i in rows.random[j]), default=0) if self.pool else 0
            normal = sum(self.normal.lengths(rows.normal[j])) if self.normal else 0
            longest[j] = max(prompt + answer, prompt + drawn, normal)
        return longest

    def _sequences(self, rows: StepRows, part: np.ndarray, groups: tuple[str, ...]) -> list[Pair]:
        """The sequences of some places of the batch, each group's together."""
        found: dict[str, list[Pair]] = {group: [] for group in groups}
        for j in part:
            counter = int(rows.counter[j])
            if self.forget and "forget" in groups:
                i = int(rows.forget[j])
                found["forget"].append(Pair("forget", self.forget.prompt(i), self.forget.answer(i), counter, i))
            if self.forget and self.pool and "random" in groups:
                prompt = self.forget.prompt(rows.forget[j])
                first = counter * self.plan.responses
                found["random"] += [
                    Pair("random", prompt, self.pool.answer(i), counter, first + k)
                    for k, i in enumerate(rows.random[j])
                ]
            if self.normal and "normal" in groups:
                i = int(rows.normal[j])
                found["normal"].append(Pair("normal", self.normal.prompt(i), self.normal.answer(i), counter, i))
        return [sequence for group in groups for sequence in found[group]]

    def _assemble(self, sequences: list[Pair], groups: tuple[str, ...], labels_key: int | None) -> MicroBatch:
        places, (height, width) = lay_out([sequence.length for sequence in sequences], self.packing)
        input_ids = torch.zeros(height, width, dtype=torch.long)
        position_ids = torch.arange(width).repeat(height, 1) if self.packing else None
        positions: list[Tensor] = []
        for sequence, (row, first) in zip(sequences, places, strict=True):
            ids = np.concatenate([sequence.prompt, sequence.answer]).astype(np.int64)
            input_ids[row, first : first + len(ids)] = torch.from_numpy(ids)
            if position_ids is not None:
                position_ids[row, first : first + len(ids)] = torch.arange(len(ids))
            start = row * width + first + len(sequence.prompt) - 1
            positions.append(torch.arange(start, start + len(sequence.answer)))
        answers, first = {}, 0
        for group in groups:
            members = [sequence for sequence in sequences if sequence.group == group]
            answers[group] = self._answers(group, members, first, labels_key)
            first += len(answers[group].targets)
        return MicroBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.long),
            groups=answers,
            tokens=sum(sequence.length for sequence in sequences),
        )

    def _answers(self, group: str, members: list[Pair], first: int, labels_key: int | None) -> Answers:
        lengths = [len(member.answer) for member in members]
        targets = [torch.from_numpy(member.answer.astype(np.int64)) for member in members]
        mask = torch.arange(max(lengths, default=1)) < torch.tensor(lengths, dtype=torch.long).reshape(-1, 1)
        original = logp = uniforms = None
        reference = self.references.get(group)
        if reference and reference.what == "logp":
            logp = _joined([reference.logp(member.key) for member in members], torch.empty(0))
        elif reference:
            original = _joined([reference.states(member.key) for member in members], reference.no_states)
        if labels_key is not None:
            purpose = f"labels-{group}-{labels_key}"
            numbers = [
                torch.from_numpy(draw(self.plan.seed, purpose, member.counter).random(n))
                for member, n in zip(members, lengths, strict=True)
            ]
            uniforms = _joined(numbers, torch.empty(0, dtype=torch.float64))
        return Answers(
            first=first,
            targets=_joined(targets, torch.empty(0, dtype=torch.long)),
            mask=mask.float(),
            original=original,
            original_logp=logp,
            uniforms=uniforms,
        )


def _joined(parts: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.cat(parts) if parts else nothing


def lay_out(lengths: Sequence[int], packing: bool) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(row, first column) of sequences of `lengths`, and (rows, columns) of what holds them.

    Without packing each has its own row. With it, the longest come first and each goes into the first row with room,
    no row being longer than the longest sequence: attention's cost grows with the square of a row's length.
    """
    width = max(lengths, default=2)
    if not packing:
        return [(row, 0) for row in range(len(lengths))], (max(1, len(lengths)), width)
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, used in enumerate(filled) if used + lengths[i] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places, (max(1, len(filled)), width)


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch on `device`."""

    def moved(part: Any) -> Any:
        return part._replace(**{k: v.to(device) for k, v in part._asdict().items() if isinstance(v, Tensor)})

    groups = {name: moved(answers) for name, answers in batch.groups.items()}
    return moved(batch)._replace(groups=groups)
