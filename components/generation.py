"""A model's own answers to prompts. They follow its probabilities, not the checkpoint's wishes for generation."""

from collections.abc import Sequence
from typing import Any, Literal

Batching = Literal["padded", "equal lengths", "one by one"]
"""Prompts that a model can be asked in one batch: any, padded on the left; those of one length; only a single one."""

_TRIED = 4  # tokens generated to find out the batching


def own_generation(model: Any, tokenizer: Any) -> list[int]:
    """Replace the checkpoint's generation_config by one that names nothing but the tokens that end an answer.

    The checkpoint's may ask for a repetition penalty, beams, suppressed or forced tokens, a shortest length, stop
    strings and more: `generate` would obey, and the answers would not be those that the model finds likeliest.

    Returns:
        The ids that end an answer: the EOS of the tokenizer, of generation_config and of config.
    """
    from transformers import GenerationConfig

    ends = _end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.eos_token_id)
    return ends


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    text = model.config.get_text_config()
    holders = (tokenizer, model.generation_config, model.config, text)
    named = [getattr(holder, "eos_token_id", None) for holder in holders]
    ids = [i for found in named for i in (found if isinstance(found, list | tuple) else [found])]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < text.vocab_size))


def find_batching(model: Any, prompt: Sequence[int] = range(16), room: int = _TRIED) -> Batching:
    """Return the batching that leaves the model's answers as they are, found by trying.

    `prompt` is asked together with a part of it, for at most `room` tokens. Padding on the left must be invisible. It
    is not to models that ignore the mask, as recurrent ones do, or that count positions from the first column.
    """
    prompt = list(prompt)
    if _same_together(model, [prompt, prompt[-max(1, len(prompt) // 4) :]], room):
        return "padded"
    return "equal lengths" if _same_together(model, [prompt, prompt[::-1]], room) else "one by one"


def _same_together(model: Any, prompts: list[list[int]], room: int) -> bool:
    """Whether each of `prompts` gets the same logits in one batch as alone, until tokens that are as likely differ."""
    import torch

    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2

    def logits(prompts: list[list[int]]) -> Any:
        """[steps, prompts, vocabulary], around their mean."""
        settings = {"max_new_tokens": min(room, _TRIED), "do_sample": False, "eos_token_id": None}
        found = _generate(model, prompts, **settings, output_logits=True, return_dict_in_generate=True)
        steps = torch.stack(found.logits).float()
        return steps - steps.mean(-1, keepdim=True)

    try:
        together = logits(prompts)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError):  # it takes no such batch
        return False
    for i, prompt in enumerate(prompts):
        for ours, alone in zip(together[:, i], logits([prompt])[:, 0], strict=True):
            if (ours - alone).norm() > tolerance * alone.norm():
                return False
            if ours.argmax() != alone.argmax():
                break
    return True


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    limits: list[int],
    batching: Batching,
    ends: list[int],
    samples: int = 0,
    temperature: float = 1.0,
) -> list[list[str]]:
    """For each prompt its greedy answer, or `samples` drawn ones, of at most its limit in tokens; empty at 0 or less.

    `model` is one whose generation is ours (`own_generation`). The draws depend on the prompts alone.
    """
    how: dict[str, Any] = {"do_sample": False}
    if samples:
        import torch

        from components.config import digest

        torch.manual_seed(int(digest(prompts), 16))  # of the batch, which any number of workers makes alike
        how = {"do_sample": True, "temperature": temperature, "top_k": 0}
    each = max(1, samples)
    asked = [(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True) for _ in range(each)]
    groups: dict[Any, list[int]] = {}
    for i, (prompt, limit) in enumerate(asked):
        key = {"padded": (limit,), "equal lengths": (limit, len(prompt)), "one by one": (i,)}[batching]
        if limit > 0:
            groups.setdefault(key, []).append(i)
    texts = [""] * len(asked)
    for group in groups.values():
        together = [asked[i][0] for i in group]
        found = _generate(model, together, **how, max_new_tokens=asked[group[0]][1])[:, max(map(len, together)) :]
        for i, ids in zip(group, found.tolist(), strict=True):
            texts[i] = answer_text(tokenizer, ids, ends)
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def _generate(model: Any, prompts: list[list[int]], **how: Any) -> Any:
    """transformers' `generate` on one batch, padded on the left."""
    import torch

    width, padding = max(map(len, prompts)), model.generation_config.pad_token_id
    padded = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        return model.generate(input_ids=padded, attention_mask=mask, **how)


def answer_text(tokenizer: Any, ids: list[int], ends: list[int]) -> str:
    """Generated ids up to the first that ends an answer, as text."""
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
