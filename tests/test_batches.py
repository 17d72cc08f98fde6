import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from components.config import Objective
from components.data.rows import PreparedRows
from components.data.streams import Plan
from components.training.batches import Batcher, lay_out
from components.training.engine import Outputs
from components.training.losses import combine
from components.training.reference import Reference, needs
from tests.conftest import write_rows

GROUPS = ("forget", "random", "normal")


@functools.cache
def rows(count: int, seed: int) -> PreparedRows:
    """Rows of 2 to 5 prompt and 1 to 6 answer tokens, each token telling its set and row."""
    rng = np.random.default_rng(seed)
    ids = [[100 * seed + i] * int(rng.integers(3, 12)) for i in range(count)]
    starts = [int(rng.integers(2, len(row))) for row in ids]
    return write_rows(Path(tempfile.mkdtemp()), ids, starts)


def batcher(rank: int = 0, world: int = 1, micro: int = 3, packing: bool = False) -> Batcher:
    forget, normal, pool = rows(11, 1), rows(7, 2), rows(9, 3)
    plan = Plan(seed=0, batch_size=8, forget=11, normal=7, pool=9, responses=2)
    return Batcher(plan, forget, normal, pool, {}, micro, packing, rank, world)


def targets(batches: list, group: str) -> list[int]:
    return sorted(int(t) for batch in batches for t in batch.groups[group].targets)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 1])  # step 1 is the partial batch of 3 rows
def test_ranks_and_micro_batches_share_out_the_same_tokens(world: int, step: int) -> None:
    whole = batcher(micro=100)
    step_rows = whole.plan.step_rows(step)
    counts = whole.counts(step_rows)
    [expected] = whole.micro_batches(step_rows, GROUPS)
    shares = [list(batcher(rank, world).micro_batches(step_rows, GROUPS)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # collectives need equally many on every rank
    for group in GROUPS:
        assert targets([b for share in shares for b in share], group) == targets([expected], group)
        assert len(targets([expected], group)) == counts[group]


def test_positions_predict_the_answer_tokens() -> None:
    whole = batcher(micro=100)
    [batch] = whole.micro_batches(whole.plan.step_rows(0), GROUPS)
    flat = batch.input_ids.flatten()
    all_targets = torch.cat([batch.groups[group].targets for group in GROUPS])
    assert torch.equal(flat[batch.positions + 1], all_targets)
    first = 0
    for group in GROUPS:
        assert batch.groups[group].first == first
        first += len(batch.groups[group].targets)


def test_random_responses_stand_behind_forget_prompts() -> None:
    whole = batcher(micro=100)
    step_rows = whole.plan.step_rows(0)
    [batch] = whole.micro_batches(step_rows, ("random",))
    order = whole.share(step_rows)
    expected = [(step_rows.forget[place], j) for place in order for j in step_rows.random[place]]
    assert len(batch.input_ids) == 16
    for row, (forget, response) in zip(batch.input_ids, expected, strict=True):
        length = len(whole.forget.prompt(forget)) + len(whole.pool.answer(response))
        joined = np.concatenate([whole.forget.prompt(forget), whole.pool.answer(response)])
        assert row[:length].tolist() == joined.tolist()


def test_padding_back_to_rows() -> None:
    whole = batcher(micro=100)
    [batch] = whole.micro_batches(whole.plan.step_rows(0), GROUPS)
    answers = batch.groups["normal"]
    padded = answers.padded(answers.targets.float() + 1)
    assert torch.equal(padded > 0, answers.mask.bool())
    assert torch.equal(padded[answers.mask.bool()], answers.targets.float() + 1)


def test_an_empty_share_is_a_batch_without_answers() -> None:
    step_rows = batcher().plan.step_rows(1)  # 3 rows for 5 ranks
    [empty] = batcher(rank=4, world=5).micro_batches(step_rows, GROUPS, labels_key=0)
    assert empty.positions.numel() == 0
    assert empty.input_ids.shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forget", ["gradient_ascent", "npo", "dpo", "undial", "rmu"])
def test_an_empty_share_has_a_loss_of_zero(forget: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A rank without rows still has a loss that depends on all outputs, so that it takes part in every collective."""
    objective = Objective.model_validate({
        "forget": {"type": forget, **({"layer": 1} if forget == "rmu" else {})},
        "random": {"type": "random_response"},
        "normal": {"type": "embedding_difference", "layer": 1} if forget == "rmu" else {"type": "kl_to_original"},
    })  # fmt: skip
    references = {group: _reference(tmp_path / group, what, dtype) for group, what in needs(objective).items()}
    rank = batcher(rank=4, world=5)._replace(references=references)
    step_rows = rank.plan.step_rows(1)
    [empty] = rank.micro_batches(step_rows, GROUPS)
    outputs = Outputs(*(torch.zeros(0, n, dtype=dtype, requires_grad=True) for n in (5, 4)))
    weights = dict.fromkeys(GROUPS, 1.0)
    loss, parts = combine(outputs, empty, objective, weights, rank.counts(step_rows), references, torch.ones(4))
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in parts.values())
    assert all(output.grad is not None for output in outputs)


def _reference(folder: Path, what: str, dtype: torch.dtype) -> Reference:
    folder.mkdir()
    name = "fp32" if dtype == torch.float32 else "bf16"
    (folder / "about.json").write_text(json.dumps({"what": what, "dtype": name, "size": 4}))
    np.save(folder / "keys.npy", np.empty(0, dtype=np.int64))
    if what == "hidden":
        save_file({"weight": torch.randn(5, 4, dtype=dtype)}, folder / "head.safetensors")
    return Reference(folder)


def test_label_uniforms_do_not_depend_on_the_split() -> None:
    step_rows = batcher().plan.step_rows(0)

    def uniforms(parts: list[Batcher]) -> list[float]:
        return sorted(
            float(u) for part in parts for b in part.micro_batches(step_rows, ("normal",), labels_key=4)
            for u in b.groups["normal"].uniforms
        )  # fmt: skip

    whole = uniforms([batcher(micro=100)])
    assert uniforms([batcher(rank, 2) for rank in range(2)]) == whole
    assert len(set(whole)) == len(whole)
    [other] = batcher(micro=100).micro_batches(step_rows, ("normal",), labels_key=5)
    assert sorted(other.groups["normal"].uniforms.tolist()) != whole


def test_packed_rows_hold_every_sequence_once_and_begin_anew() -> None:
    step_rows = batcher().plan.step_rows(0)
    [packed] = batcher(micro=100, packing=True).micro_batches(step_rows, GROUPS)
    [apart] = batcher(micro=100).micro_batches(step_rows, GROUPS)
    assert packed.input_ids.shape[1] == apart.input_ids.shape[1]
    assert packed.input_ids.shape[0] < apart.input_ids.shape[0]
    flat = packed.input_ids.flatten()
    assert torch.equal(flat[packed.positions + 1], torch.cat([packed.groups[group].targets for group in GROUPS]))
    assert packed.tokens == apart.tokens
    filled = packed.input_ids > 0
    assert int(filled.sum()) == packed.tokens
    # Each token tells its row, and forget and random share prompts: a sequence begins where its position is 0.
    assert int((packed.position_ids[filled] == 0).sum()) == len(apart.input_ids)


@pytest.mark.parametrize("seed", range(5))
def test_packing_wastes_little_and_overlaps_nothing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, 60).tolist()
    places, (height, width) = lay_out(lengths, packing=True)
    taken = np.zeros((height, width), dtype=int)
    for (row, first), length in zip(places, lengths, strict=True):
        assert first + length <= width
        taken[row, first : first + length] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(lengths)
    assert height <= 11 / 9 * math.ceil(sum(lengths) / width) + 1  # first-fit decreasing's own bound


def test_micro_batches_hold_rows_of_like_length() -> None:
    whole = batcher(micro=2)
    widths = [batch.input_ids.shape[1] for batch in whole.micro_batches(whole.plan.step_rows(0), GROUPS)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_out_each_epoch_exactly_once_the_same_way_every_time(world: int) -> None:
    def epoch(number: int) -> list[list[str]]:
        ranks = []
        for rank in range(world):
            own = batcher(rank, world)
            steps = range(number * own.plan.steps_per_epoch, (number + 1) * own.plan.steps_per_epoch)
            rows = [own.plan.step_rows(step) for step in steps]
            ranks.append([own.forget.row_id(i) for r in rows for i in r.forget[own.share(r)]])
        return ranks

    for number in (0, 1, 5):
        ranks = epoch(number)
        assert epoch(number) == ranks
        together = [row for rank in ranks for row in rank]
        assert sorted(together) == sorted(str(i) for i in range(11))
        assert len(set(together)) == len(together)
    assert epoch(0) != epoch(1)
