"""The decoder layers of a causal language model: find them, watch one's output, leave out those above it."""

from typing import Any

import torch
from torch import Tensor, nn

from components.errors import ModelError


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers.

    Raises:
        ModelError: when the model holds no list of as many modules as its config names layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():  # of the text: a vision tower may have as many layers
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"Decoder layers cannot be found (class={type(model).__name__}). Expected a list of {count} modules, as the "
        "config's num_hidden_layers says. Take an objective without activations, or another model."
    )


def check_layer(model: Any, layer: int) -> None:
    """Refuse a layer that the model has not.

    Raises:
        ModelError: naming how many it has.
    """
    if problem := no_such_layer(layer, len(decoder_layers(model))):
        raise ModelError(problem)


def no_such_layer(layer: int, count: int) -> str | None:
    """What to tell where a model of `count` layers has no `layer`; else None."""
    if layer < count:
        return None
    return f"Model has no such layer (layer={layer}, layers={count}). Expected 0 to {count - 1}. Set the term's layer."


class Watch:
    """Keeps the latest output of one decoder layer: [rows, length, hidden size]."""

    def __init__(self, model: Any, layer: int):
        self._states: Tensor | None = None
        self._hook = decoder_layers(model)[layer].register_forward_hook(self._keep)

    def take(self) -> Tensor:
        """The latest output, which is then forgotten."""
        states, self._states = self._states, None
        assert states is not None
        return states

    def stop(self) -> None:
        """Watch no longer."""
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._states = output[0] if isinstance(output, tuple) else output


def parameters_above(model: Any, layer: int) -> list[nn.Parameter]:
    """Parameters that do not act on the output of `layer`: layers and norms above, an output layer that is not tied."""
    above: list[nn.Module] = [*decoder_layers(model)[layer + 1 :], *_norms(model).values()]
    above.append(model.get_output_embeddings())
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    return [p for module in above for p in module.parameters() if id(p) not in shared]


def cut_after(model: Any, layer: int) -> bool:
    """Make the base model end with the output of `layer`; False, and nothing changed, where this cannot be done.

    What is left computes exactly what the whole model computes there: this is tried on a few tokens.
    """
    stack = decoder_layers(model)
    owner = _owner(model, stack)
    name = next(name for name, child in owner.named_children() if child is stack)
    norms = _norms(model)
    probe = torch.tensor([[0, 1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad():
        watch = Watch(model, layer)
        model.base_model(input_ids=probe, use_cache=False)
        watch.stop()
        setattr(owner, name, stack[: layer + 1])
        for norm in norms:
            setattr(owner, norm, nn.Identity())
        ended = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    if torch.equal(ended, watch.take()):
        return True
    setattr(owner, name, stack)
    for norm, module in norms.items():
        setattr(owner, norm, module)
    return False


def _owner(model: Any, stack: nn.ModuleList) -> nn.Module:
    return next(module for module in model.base_model.modules() if any(child is stack for child in module.children()))


def _norms(model: Any) -> dict[str, nn.Module]:
    """Norms behind the last layer: they stand beside the stack of layers."""
    return {
        name: child
        for name, child in _owner(model, decoder_layers(model)).named_children()
        if ("norm" in name or name.startswith("ln_")) and "emb" not in name
    }
