"""The table of terms: what each takes, and what its sum is divided by."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from components.config import Custom
from components.errors import ConfigError
from components.objectives import forget, keep
from components.objectives.parts import Sum

INPUTS = (
    "logp", "original_logp", "mask", "chosen_logp", "chosen_original_logp", "chosen_mask",
    "logits", "original_logits", "targets", "states", "original_states", "direction",
)  # fmt: skip
"""What a term may take, by the name of its parameter; shapes stand in `forget.py`."""


class Term(NamedTuple):
    """A term as the loop uses it."""

    function: Callable[..., Sum]
    inputs: tuple[str, ...]
    """The inputs it takes; its other arguments are the term's settings."""
    per: Literal["token", "row"] = "token"
    """What its sum is divided by the global count of."""


TERMS: dict[str, Term] = {
    # by the config's type
    "gradient_ascent": Term(forget.gradient_ascent, ("logp", "mask")),
    "bounded_ascent": Term(forget.bounded_ascent, ("logp", "mask")),
    "kl_ascent": Term(forget.kl_ascent, ("logits", "original_logits", "targets")),
    "max_entropy": Term(forget.max_entropy, ("logits", "targets")),
    "npo": Term(forget.npo, ("logp", "original_logp", "mask"), per="row"),
    "simnpo": Term(forget.simnpo, ("logp", "mask"), per="row"),
    "dpo": Term(forget.dpo, INPUTS[:6], per="row"),
    "wga": Term(forget.wga, ("logp", "mask")),
    "satimp": Term(forget.satimp, ("logp", "mask")),
    "ce_u": Term(forget.ce_u, ("logits", "targets")),
    "undial": Term(forget.undial, ("logits", "original_logits", "targets")),
    "rmu": Term(forget.rmu, ("states", "direction")),
    "logit_flattening": Term(forget.logit_flattening, ("logits", "targets")),
    "random_response": Term(keep.cross_entropy, ("logp", "mask")),
    "nll": Term(keep.cross_entropy, ("logp", "mask")),
    "kl_to_original": Term(keep.kl_to_original, ("logits", "original_logits")),
    "reverse_kl": Term(keep.reverse_kl, ("logits", "original_logits")),
    "jensen_shannon": Term(keep.jensen_shannon, ("logits", "original_logits")),
    "embedding_difference": Term(keep.embedding_difference, ("states", "original_states")),
}

_NOT_SETTINGS = {"type", "weight", "responses", "layer"}


def find_term(config: Any) -> Term:
    """The term of a section of the objective.

    Raises:
        ConfigError: when a custom one cannot be imported, or asks for what is neither an input nor in its settings.
    """
    return _imported(config) if isinstance(config, Custom) else TERMS[config.type]


def settings(config: Any) -> dict[str, Any]:
    """The term's arguments that are not inputs."""
    return config.settings if isinstance(config, Custom) else config.model_dump(exclude=_NOT_SETTINGS)


def code_digest(config: Custom) -> str:
    """32 hex digits of the file that defines a custom term."""
    file = inspect.getsourcefile(find_term(config).function)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:32]


def _imported(config: Custom) -> Term:
    module, _, name = config.import_path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"Custom term cannot be imported (import_path={config.import_path}): {error}. Expected a function that "
            "every worker can import. Install its package, or run from the folder that holds it."
        ) from error
    takes = inspect.signature(function).parameters
    needed = {key for key, parameter in takes.items() if parameter.default is inspect.Parameter.empty}
    if (missing := needed - {*INPUTS} - {*config.settings}) or (unknown := {*config.settings} - {*takes}):
        misfit = f"lacks {sorted(missing)}" if missing else f"does not take {sorted(unknown)}"
        raise ConfigError(
            f"Custom term does not fit (import_path={config.import_path}): it {misfit}. Expected parameters named "
            f"after the inputs ({', '.join(INPUTS)}) or after its settings."
        )
    inputs = tuple(key for key in takes if key in INPUTS)
    if problem := _cannot_have(config, inputs):
        raise ConfigError(f"Custom term asks for what it cannot have (import_path={config.import_path}): {problem}.")
    return Term(function, inputs, config.per)


def _cannot_have(config: Custom, inputs: tuple[str, ...]) -> str | None:
    if any(name.startswith("chosen_") for name in inputs) and not config.chosen:
        return "the random responses, without chosen=true"
    if {"states", "original_states", "direction"} & {*inputs} and config.layer is None:
        return "activations, without a layer"
    if config.layer is not None and {"logits", "logp"} & {*inputs}:
        return "activations and logits at once"
    originals = [name for name in inputs if name.startswith("original_")]
    return f"{' and '.join(originals)}; one of them is kept for a group" if len(originals) > 1 else None
