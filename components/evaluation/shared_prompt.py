"""Several answers behind one prompt in one row: the prompt is forwarded once, and no answer sees another.

Of a question with a right, a paraphrased and five wrong answers that is one row in place of seven.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MASK = 1 << 25  # numbers in an attention mask at most


class Row(NamedTuple):
    """What is forwarded: the prompt, then each answer without its last token, which predicts nothing."""

    ids: list[int]
    positions: list[int]
    """Within prompt and answer."""
    branch: list[int]
    """0 for the prompt, n for the n-th answer."""
    places: list[list[int]]
    """For each answer, where the states are that predict its tokens."""
    answers: list[list[int]]


def side_by_side(prompt: list[int], answers: list[list[int]]) -> Row:
    """A row of `prompt` and all of `answers`."""
    ids, positions, branch, places = list(prompt), list(range(len(prompt))), [0] * len(prompt), []
    for n, answer in enumerate(answers, start=1):
        places.append([len(prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)])
        ids += answer[:-1]
        positions += range(len(prompt), len(prompt) + len(answer) - 1)
        branch += [n] * (len(answer) - 1)
    return Row(ids, positions, branch, places, answers)


def hidden_states(model: Any, rows: Sequence[Row]) -> "Tensor":
    """[rows, longest, hidden] last hidden states. Rows are padded on the right."""
    import torch

    ids, positions, branch = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(values, device=model.device) for values in column], batch_first=True, padding_value=padding
        )
        for column, padding in zip(list(zip(*rows, strict=True))[:3], (0, 0, -1), strict=True)
    )
    if all(len(row.answers) == 1 for row in rows):  # attention is causal, and nothing more is needed
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    sees = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    sees &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=ids.device)
    mask.masked_fill_(~sees, torch.finfo(model.dtype).min)
    return model.base_model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state


def takes_shared_prompts(model: Any) -> bool:
    """Whether the model obeys such a mask, tried on a few tokens."""
    import torch

    together = side_by_side([5, 6, 7], [[8, 9, 5, 6], [9, 7, 8]])
    apart = [side_by_side([5, 6, 7], [answer]) for answer in together.answers]
    with torch.no_grad():
        try:
            shared = hidden_states(model, [together])[0]
        except (TypeError, ValueError, RuntimeError):  # it knows no masks of this form
            return False
        alone = [hidden_states(model, [row])[0][row.places[0]] for row in apart]
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
    pairs = zip((shared[places] for places in together.places), alone, strict=True)
    return all(bool((ours - theirs).norm() < tolerance * theirs.norm()) for ours, theirs in pairs)


def fits(row: Row, window: int | None) -> bool:
    """Whether the row's mask is small enough, and no token is out of another's sight for a sliding window."""
    return len(row.ids) ** 2 <= MASK and (window is None or max(row.positions) < window)


def parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows in turn, as many at a time as their masks fit into `MASK` numbers."""
    first = longest = 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row.ids))
        if i > first and (i + 1 - first) * longest**2 > MASK:
            yield rows[first:i]
            first, longest = i, len(row.ids)
    if rows:
        yield rows[first:]
