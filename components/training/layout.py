"""Where each parameter's numbers lie in what the optimizer holds on this rank, said alike for every ZeRO stage."""

from typing import Any, NamedTuple

import torch
from torch import nn


class Fragment(NamedTuple):
    """A run of one parameter's numbers, flattened, inside one of the engine's `optimizer_parameters`."""

    name: str
    start: int
    """Place of the first number within the parameter."""
    length: int
    piece: int
    """Index of the optimizer parameter that holds it."""
    offset: int
    """Place of the first number within that."""


def fragments(engine: Any) -> list[Fragment]:
    """Of all trained parameters, as far as they lie on this rank; ZeRO's padding belongs to none."""
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        places = {id(p): i for i, p in enumerate(p for g in engine.basic_optimizer.param_groups for p in g["params"])}
        return [Fragment(name, 0, p.numel(), places[id(p)], 0) for name, p in trained]
    found = [_of_zero3(name, p, wrapper) if stage == 3 else _of_zero12(name, p) for name, p in trained]
    return [fragment for fragment in found if fragment and fragment.length]


def _of_zero12(name: str, p: nn.Parameter) -> Fragment | None:
    mapping = p._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # no number of it lies on this rank
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, here.start, here.numel, mapping.param_group_index, there.start)


def _of_zero3(name: str, p: Any, wrapper: Any) -> Fragment:
    """Every rank has an equal share of every parameter, the last one padded."""
    piece, offset, share = wrapper.grad_position[wrapper.get_param_id(p)]
    start = share * torch.distributed.get_rank(p.ds_process_group)
    return Fragment(name, start, max(0, min(share, p.ds_numel - start)), piece, offset)
