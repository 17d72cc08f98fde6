"""Several answers behind one prompt in one row: the prompt is forwarded once, and no answer sees another.

Of a question with a right, a paraphrased and five wrong answers that is one row in place of seven.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MASK = 1 << 25  # numbers in an attention mask at most
_WINDOWS = (  # as transformers' configs name them
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "local_attention",
    "local_attention_window_len",
)


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


def may_share(model: Any, row: Row) -> bool:
    """Whether the row's mask is small enough and no token is out of sight of another, as in a sliding window."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOWS]
    given = [window for window in windows if isinstance(window, int) and window > 0]  # 0 means none
    return len(row.ids) <= min([int(MASK**0.5), *given])


def worth_sharing(row: Row, hidden_size: int) -> bool:
    """Whether one row costs less than one for each answer.

    In multiplications of a layer over 2·hidden_size: 6·hidden_size for each token in its matrices, and one for each
    pair of tokens that attention compares, of which plain causal attention leaves out half. Where the model is narrow
    and answers are long, the pairs between answers, which the mask throws away, cost more than the prompts saved.
    """
    prompt = row.branch.count(0)
    apart = [prompt + len(answer) - 1 for answer in row.answers]
    together = len(row.ids) * 6 * hidden_size + len(row.ids) ** 2
    return together < sum(length * 6 * hidden_size + length**2 / 2 for length in apart)


def shares(model: Any, row: Row) -> bool:
    """Whether the model obeys such a mask: tried on `row`, against each answer by itself."""
    import torch

    prompt = row.ids[: row.branch.count(0)]
    with torch.no_grad():
        try:
            together = hidden_states(model, [row])[0]
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it knows no masks of this form
            return False
        apart = [side_by_side(prompt, [answer]) for answer in row.answers]
        alone = torch.cat([hidden_states(model, [one])[0][one.places[0]] for one in apart])
    ours = together[[place for places in row.places for place in places]]
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool(((ours - alone).norm(dim=-1) < tolerance * alone.norm(dim=-1)).all())


def parts(rows: Sequence[Row], at_most: int) -> Iterator[Sequence[Row]]:
    """The rows in turn, `at_most` so many at a time, and fewer where their masks would be more than `MASK` numbers.

    Rows of one answer, which need none, are not put together with others: their model may have windows of its own.
    """
    first = longest = 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row.ids))
        other_kind = (len(row.answers) == 1) != (len(rows[first].answers) == 1)
        if i > first and (other_kind or i - first == at_most or (i + 1 - first) * longest**2 > MASK):
            yield rows[first:i]
            first, longest = i, len(row.ids)
    if rows:
        yield rows[first:]
