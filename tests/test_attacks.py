"""Attacks: what rounding, prompts and relearning do to a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from components.config import Files, Text
from components.evaluation.attacks import part_left_out, prefixed, quantise, rounded
from components.matrices import block_matrices, share_of_blocks
from components.models import load_model
from tests.families import tiny, tiny_folder


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


INPUTS = {
    "gpt2": {"attn.c_attn.weight": 0, "mlp.c_proj.weight": 0},
    "openai-gpt": {"attn.c_proj.weight": 0},
    "llama": {"self_attn.q_proj.weight": 1, "mlp.down_proj.weight": 1},
    "mixtral": {"experts.gate_up_proj": 2, "experts.down_proj": 2, "gate.weight": 1},
    "olmoe": {"experts.gate_up_proj": 2, "experts.down_proj": 2},
    "qwen3_moe": {"experts.gate_up_proj": 2, "experts.down_proj": 2},
    "phimoe": {"experts.gate_up_proj": 2, "router.weight": 1},
    "gpt_oss": {"experts.gate_up_proj": 1, "experts.down_proj": 1, "router.weight": 1},
    "jetmoe": {"mlp.input_linear.weight": 2, "mlp.output_linear.weight": 2},
    "dbrx": {"mlp.w1": 1, "mlp.v1": 1, "mlp.w2": 0},
    "minimax": {"experts.down_proj": 2, "self_attn.out_proj.weight": 1},
    "rwkv": {"attention.key.weight": 1, "feed_forward.value.weight": 1},
    "mamba": {"mixer.in_proj.weight": 1, "mixer.x_proj.weight": 1},
    "bloom": {"self_attention.query_key_value.weight": 1},
}
"""Dimension of some matrices that is summed over, as the families' code has it: of 3 an expert's, of 2 x W or W x."""


@pytest.mark.parametrize("family", INPUTS)
def test_quantisation_reaches_the_blocks_of_every_family(family: str, base: Path, tmp_path: Path) -> None:
    """Every matrix has at most 15 levels in each row of inputs, and nothing else has changed."""
    folder = tiny_folder(family, base, tmp_path / "model")
    share = quantise(folder, 4, tmp_path / "rounded")
    before, after = (dict(load_model(place).named_parameters()) for place in (folder, tmp_path / "rounded"))
    found = block_matrices(load_model(folder))
    for end, dimension in INPUTS[family].items():
        assert {d for name, d in found.items() if name.endswith(end)} == {dimension}, end
    for name, one in before.items():
        if name not in found:
            assert torch.equal(one, after[name]), name
            continue
        rows = one.movedim(found[name], -1).flatten(0, -2), after[name].movedim(found[name], -1).flatten(0, -2)
        parts = [tensor.unflatten(-1, (-1, 64 if tensor.shape[-1] % 64 == 0 else tensor.shape[-1])) for tensor in rows]
        step = parts[0].abs().amax(-1, keepdim=True) / 7
        assert ((parts[0] - parts[1]).abs() <= step / 2 + 1e-6).all(), name
        assert max(len(part.unique()) for row in parts[1] for part in row) <= 15, name
        assert not torch.equal(one, after[name]), name
    heads = {"mamba": 0.9, "gpt_oss": 0.97}  # a convolution and A_log; the experts' biases
    assert share == pytest.approx(1) if family not in heads else heads[family] < share < 1


def test_the_share_says_what_was_left_out() -> None:
    model = tiny("gpt2")
    found = block_matrices(model)
    assert share_of_blocks(model, found) == 1
    attention = [name for name in found if ".attn." in name]
    of_attention, of_rest = 4 * 32 * 32, 2 * 4 * 32 * 32  # c_attn and c_proj, c_fc and c_proj
    assert share_of_blocks(model, attention) == pytest.approx(of_attention / (of_attention + of_rest))
    assert not any("wte" in name or "wpe" in name or "lm_head" in name for name in found)


def test_matrices_that_only_other_experts_use_are_found() -> None:
    """Of single experts, each a module of its own, the probe asks one: the others are of the same class."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
            self.turned = nn.Parameter(torch.randn(32, 32))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.many[0](states) @ self.turned

    model = tiny("llama")
    model.model.layers[0].mlp = Experts()
    found = {name: d for name, d in block_matrices(model).items() if name.startswith("model.layers.0.mlp")}
    expected = {f"model.layers.0.mlp.many.{i}.weight": 1 for i in range(3)}
    assert found == expected | {"model.layers.0.mlp.turned": 0}


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
