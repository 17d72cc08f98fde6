"""Changes to a model or its prompts that may bring back what was forgotten."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.config import Data, Source, Text
from components.data.prompts import DEFAULT_TEMPLATE
from components.data.streams import draw
from components.files import whole_folder
from components.matrices import block_matrices, share_of_blocks
from components.models import load_model, load_tokenizer, save_model

GROUP = 64  # weights that share a scale at less than 8 bits


def quantise(model: Path, bits: int, into: Path) -> float:
    """Write the model with the matrices of its blocks rounded, in fp32; embeddings and output layer stay.

    To the nearest of 2^bits − 1 levels, symmetric around 0, with a scale for each row of inputs (8 bits and more) or
    for each group of 64 of them: as common quantised formats do.

    Returns:
        The share of the blocks' weights that were rounded, of those in parameters of two and more dimensions.
    """
    loaded = load_model(model)
    found = block_matrices(loaded)
    weights = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, inputs in found.items():
            weights[name].copy_(rounded(weights[name], bits, inputs))
    with whole_folder(into) as partial:
        save_model(loaded, load_tokenizer(model), partial)
    return share_of_blocks(loaded, found)


def rounded(weights: Tensor, bits: int, inputs: int = -1, group: int = GROUP) -> Tensor:
    """`weights` rounded to 2^bits − 1 levels, in rows along the dimension `inputs`."""
    rows = weights.movedim(inputs, -1)
    columns = rows.shape[-1]
    width = columns if bits >= 8 or columns % group else group
    parts = rows.unflatten(-1, (columns // width, width))
    levels = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny) / levels
    return ((parts / scale).round().clamp(-levels, levels) * scale).flatten(-2).movedim(-1, inputs)


def part_left_out(count: int, share: float, seed: int) -> np.ndarray:
    """Sorted indices of the rows that relearning must not see, of `count`."""
    kept = max(1, round(share * count))
    return np.sort(draw(seed, "relearn", 0).permutation(count)[kept:])


def shots_prefix(pairs: Sequence[tuple[str, str]], data: Data, chat: bool) -> str:
    """What makes a prompt the last of several questions, with the others' answers behind them.

    As `data` writes prompts and answers; in a chat, all stand in one message in the form without chat template.
    """
    head, _, tail = (data.template or DEFAULT_TEMPLATE).partition("{prompt}")
    told = "".join(f"{head}{question}{tail}{data.answer_prefix}{answer}\n\n" for question, answer in pairs) + head
    return told if chat else told.removeprefix(head)


def asked_by(source: Source, column: str) -> Source:
    """The same rows with another column as their question."""
    return source if isinstance(source, Text) else source.model_copy(update={"prompt": column})


def prefixed(source: Source, prefix: str) -> Source:
    """The same questions with a text in front of each prompt."""
    if isinstance(source, Text):
        return source
    is_text = any(name is not None for _, name, *_ in string.Formatter().parse(source.prompt))
    escaped = prefix.replace("{", "{{").replace("}", "}}")
    changed: dict[str, Any] = {"prompt": escaped + (source.prompt if is_text else "{" + source.prompt + "}")}
    return source.model_copy(update=changed)
