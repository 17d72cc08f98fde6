"""Rows of one step → the tensors of one rank's micro-batches."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from components.data.streams import Plan, StepRows, draw


class Rows:
    """Tokenised rows of one set with fast access by index."""

    def __init__(self, table: pa.Table):
        self._ids = table["input_ids"].combine_chunks()
        self._start = table["answer_start"].to_numpy()
        self.lengths = pa.compute.list_value_length(self._ids).to_numpy(zero_copy_only=False).astype(np.int64)
        self.answer_lengths = self.lengths - self._start

    def __len__(self) -> int:
        return len(self._start)

    def prompt(self, i: int) -> np.ndarray:
        return self._ids[int(i)].values.to_numpy()[: self._start[i]]

    def answer(self, i: int) -> np.ndarray:
        return self._ids[int(i)].values.to_numpy()[self._start[i] :]


class Reference:
    """The original model's last hidden states at the positions that predict answer tokens, and its output layer.

    Hidden states times the frozen output layer give the original's logits exactly, at a fraction of their size.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        from safetensors.torch import load_file

        head = load_file(folder / "head.safetensors", device=str(device))
        self.weight, self.bias = head["weight"], head.get("bias")
        table = pa.parquet.read_table(folder / "hidden.parquet", memory_map=True)
        self._hidden = table["hidden"].combine_chunks()

    def hidden(self, i: int) -> Tensor:
        """[answer tokens, hidden size] of normal row `i`."""
        flat = torch.frombuffer(bytearray(self._hidden[int(i)].as_py()), dtype=self.weight.dtype)
        return flat.view(-1, self.weight.shape[1])

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


class Answers(NamedTuple):
    """The answer tokens of one group's rows in a micro-batch, flattened in row order."""

    first: int
    """Place of the group's first token among the micro-batch's answer tokens."""
    targets: Tensor
    """[n] token ids."""
    mask: Tensor
    """[rows, longest] 1.0 on answer tokens; `mask.bool()` scatters flat values back to rows."""
    hidden: Tensor | None = None
    """[n, hidden size] of the original model."""
    uniforms: Tensor | None = None
    """[n] numbers in [0, 1) for sampling labels, the same on any rank."""

    def padded(self, flat: Tensor) -> Tensor:
        """[n] → [rows, longest], 0 where there is no token."""
        return torch.zeros_like(self.mask, dtype=flat.dtype).masked_scatter(self.mask.bool(), flat)


class MicroBatch(NamedTuple):
    """One forward pass: all groups' rows together, so that ZeRO-3 gathers each layer once."""

    input_ids: Tensor
    """[rows, longest] right-padded with 0: under causal attention padding behind an answer cannot reach it."""
    positions: Tensor
    """[n] flat places in `input_ids` whose output predicts an answer token."""
    groups: dict[str, Answers]
    tokens: int
    """Input tokens without padding."""


class Batcher(NamedTuple):
    """Everything needed to build micro-batches of any step, for one rank."""

    plan: Plan
    forget: Rows | None
    normal: Rows | None
    pool: Rows | None
    reference: Reference | None
    micro_batch_size: int
    rank: int
    world: int

    def counts(self, rows: StepRows) -> dict[str, int]:
        """Answer tokens of each group over all ranks and micro-batches: what each term is divided by."""
        return {
            "forget": int(self.forget.answer_lengths[rows.forget].sum()) if self.forget else 0,
            "random": int(self.pool.answer_lengths[rows.random].sum()) if self.pool else 0,
            "normal": int(self.normal.answer_lengths[rows.normal].sum()) if self.normal else 0,
        }

    def micro_batches(
        self, rows: StepRows, groups: tuple[str, ...], labels_key: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's share, in as many micro-batches as every other rank has, empty ones included.

        `labels_key` seeds uniforms for label sampling.
        """
        mine = np.arange(self.rank, len(rows.counter), self.world)
        count = math.ceil(math.ceil(len(rows.counter) / self.world) / self.micro_batch_size)
        for k in range(count):
            part = mine[k * self.micro_batch_size : (k + 1) * self.micro_batch_size]
            yield self._assemble(rows, part, groups, labels_key)

    def _assemble(
        self, rows: StepRows, part: np.ndarray, groups: tuple[str, ...], labels_key: int | None
    ) -> MicroBatch:
        sequences: list[tuple[str, np.ndarray, np.ndarray, int, int]] = []  # group, prompt, answer, row index, counter
        for j in part:
            counter = int(rows.counter[j])
            if self.forget and "forget" in groups:
                i = rows.forget[j]
                sequences.append(("forget", self.forget.prompt(i), self.forget.answer(i), int(i), counter))
            if self.forget and self.pool and "random" in groups:
                prompt = self.forget.prompt(rows.forget[j])
                sequences += [("random", prompt, self.pool.answer(i), int(i), counter) for i in rows.random[j]]
            if self.normal and "normal" in groups:
                i = rows.normal[j]
                sequences.append(("normal", self.normal.prompt(i), self.normal.answer(i), int(i), counter))
        sequences.sort(key=lambda item: groups.index(item[0]))  # stable: each group's rows stand together

        width = max((len(prompt) + len(answer) for _, prompt, answer, _, _ in sequences), default=2)
        input_ids = torch.zeros(max(1, len(sequences)), width, dtype=torch.long)
        positions: list[Tensor] = []
        for row, (_, prompt, answer, _, _) in enumerate(sequences):
            input_ids[row, : len(prompt) + len(answer)] = torch.from_numpy(
                np.concatenate([prompt, answer]).astype(np.int64)
            )
            positions.append(row * width + torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
        answers, first = {}, 0
        for group in groups:
            members = [item for item in sequences if item[0] == group]
            answers[group] = self._answers(group, members, first, labels_key)
            first += len(answers[group].targets)
        return MicroBatch(
            input_ids=input_ids,
            positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.long),
            groups=answers,
            tokens=sum(len(prompt) + len(answer) for _, prompt, answer, _, _ in sequences),
        )

    def _answers(self, group: str, members: list, first: int, labels_key: int | None) -> Answers:
        lengths = [len(answer) for _, _, answer, _, _ in members]
        targets = [torch.from_numpy(answer.astype(np.int64)) for _, _, answer, _, _ in members]
        mask = torch.arange(max(lengths, default=1)) < torch.tensor(lengths, dtype=torch.long).reshape(-1, 1)
        hidden = uniforms = None
        if group == "normal" and self.reference:
            states = [self.reference.hidden(index) for _, _, _, index, _ in members]
            hidden = torch.cat(states) if states else self.reference.weight.new_empty(0, self.reference.weight.shape[1])
        if labels_key is not None:
            purpose = f"labels-{group}-{labels_key}"
            numbers = [draw(self.plan.seed, purpose, c).random(n) for (*_, c), n in zip(members, lengths, strict=True)]
            uniforms = torch.from_numpy(np.concatenate(numbers)) if numbers else torch.empty(0, dtype=torch.float64)
        return Answers(
            first=first,
            targets=torch.cat(targets) if targets else torch.empty(0, dtype=torch.long),
            mask=mask.float(),
            hidden=hidden,
            uniforms=uniforms,
        )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch on `device`."""

    def moved(part: Any) -> Any:
        return part._replace(**{k: v.to(device) for k, v in part._asdict().items() if isinstance(v, Tensor)})

    groups = {name: moved(answers) for name, answers in batch.groups.items()}
    return moved(batch)._replace(groups=groups)
