"""Attacks: what rounding, prompts and relearning do to a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from components.config import Files, Text
from components.evaluation.attacks import part_left_out, prefixed, quantise, rounded
from components.models import load_model


def test_rounding_in_closed_form() -> None:
    weights = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert rounded(weights, 8)[0] == pytest.approx([1.0, -round(0.5 * 127) / 127, round(0.25 * 127) / 127, 0.0])
    assert rounded(weights, 2, group=2).tolist() == [[1.0, -0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]  # levels -1, 0, 1
    assert torch.equal(rounded(rounded(weights, 4, group=2), 4, group=2), rounded(weights, 4, group=2))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_near_and_few(base: Path, tmp_path: Path, bits: int) -> None:
    quantise(base, bits, tmp_path / "model")
    before, after = load_model(base), load_model(tmp_path / "model")
    kept = before.get_output_embeddings()
    for (name, one), other in zip(before.named_modules(), after.modules(), strict=True):
        if not isinstance(one, nn.Linear):
            continue
        if one is kept:
            assert torch.equal(one.weight, other.weight), name
            continue
        step = one.weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((one.weight - other.weight).abs() <= step / 2 + 1e-7).all(), name
        assert not torch.equal(one.weight, other.weight), name
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_prefixes_go_before_columns_and_templates() -> None:
    column = Files(type="files", path="x", prompt="q", answer="a")
    assert prefixed(column, "Now {tell}: ").prompt == "Now {{tell}}: {q}"
    template = column.model_copy(update={"prompt": "{context} {q}"})
    assert prefixed(template, "Say. ").prompt == "Say. {context} {q}"
    book = Text(type="text", path="x")
    assert prefixed(book, "Say. ") is book


def test_relearning_sees_the_share_it_says() -> None:
    left_out = part_left_out(50, 0.2, 3)
    assert len(left_out) == 40
    assert (np.diff(left_out) > 0).all()
    assert (part_left_out(50, 0.2, 3) == left_out).all()
    assert len(part_left_out(3, 0.01, 0)) == 2
