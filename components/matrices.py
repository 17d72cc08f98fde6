"""The matrices in a model's blocks, found by what the model multiplies with, whatever the modules are called."""

import bisect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def block_matrices(model: Any) -> dict[str, int]:
    """Parameters that the model multiplies its states with: by name, the dimension that the product sums over.

    That is the input dimension: the last of a Linear's weight, the first of GPT-2's, one or the other of the two of an
    expert's in a tensor of many experts. A forward pass over a few tokens tells; modules of the same class count as
    used alike, since a mixture asks only some of its experts. Embeddings and the output layer are no block's.
    """
    places = {
        name: (type(model.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2])
        for name, _ in model.named_parameters()
    }
    probe = torch.tensor([[0, 1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad(), _Products(dict(model.named_parameters())) as products:
        model.base_model(input_ids=probe, use_cache=False)
    used = {places[name]: dimension for name, dimension in products.summed.items()}
    found = {name: products.summed.get(name, used.get(places[name])) for name in _block_weights(model)}
    return {name: dimension for name, dimension in found.items() if dimension is not None}


def share_of_blocks(model: Any, names: Iterable[str]) -> float:
    """The share of the blocks' weights that lie in the parameters called `names`; vectors, as biases, do not count."""
    weights = _block_weights(model)
    return sum(weights[name].numel() for name in names) / max(1, sum(p.numel() for p in weights.values()))


def _block_weights(model: Any) -> dict[str, nn.Parameter]:
    """Parameters of two and more dimensions that are neither embeddings nor the output layer."""
    outside = [model.get_output_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    skipped = {id(p) for module in outside for p in module.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in skipped and sum(size > 1 for size in p.shape) > 1
    }


class _Products(TorchDispatchMode):
    """Notes for each parameter that is a factor of a matrix product which of its dimensions is summed over.

    A view of a parameter (transposed, one expert's part) is known by its memory, and its dimensions by their strides.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self.summed: dict[str, int] = {}
        self._parameters = sorted(parameters.items(), key=lambda named: named[1].data_ptr())
        self._starts = [p.data_ptr() for _, p in self._parameters]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place, dimension in _FACTORS.get(func._schema.name.split("::")[1], ()):
            self._note(args[place], dimension)
        return func(*args, **(kwargs or {}))

    def _note(self, factor: Tensor, dimension: int) -> None:
        place = bisect.bisect_right(self._starts, factor.data_ptr()) - 1
        name, owner = self._parameters[max(place, 0)]
        if not owner.data_ptr() <= factor.data_ptr() < owner.data_ptr() + owner.nbytes:
            return
        strides = {owner.stride(i): i for i, size in enumerate(owner.shape) if size > 1}
        if (found := strides.get(factor.stride(dimension))) is not None:
            self.summed[name] = found


_FACTORS = {
    "mm": ((0, 1), (1, 0)),
    "addmm": ((1, 1), (2, 0)),
    "bmm": ((0, 2), (1, 1)),
    "baddbmm": ((1, 2), (2, 1)),
    "mv": ((0, 1),),
    "addmv": ((1, 1),),
    "linear": ((1, 1),),
    "_grouped_mm": ((1, -2),),
    "grouped_mm": ((1, -2),),
    "grouped_mm_fallback": ((1, -2),),
}
"""Of each product of tensors: its factors by their place among the arguments, and the dimension it sums over."""
