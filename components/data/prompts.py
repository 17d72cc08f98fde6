"""Text → token ids with an exact boundary between prompt and answer."""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from components.data.chat import Chat, Pieces
from components.data.mapping import Message, Prompt, Unusable

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer:"
_ANCHORS = "\n:0é"  # characters that an answer is tokenised behind where the tokenizer would put a space in front of it


class TokenizerFacts(NamedTuple):
    """What preparing needs of a tokenizer, as plain data."""

    json: str
    """The text of its `tokenizer.json`."""
    eos: int
    """The id that ends an answer."""
    chat_template: str | None = None
    special: dict[str, str] = {}  # noqa: RUF012  (a named tuple's default is never written to)
    """Names and texts of its special tokens, which chat templates use."""


class Tokens(NamedTuple):
    """The ids of one prompt with its answers."""

    prompt: list[int]
    answers: list[list[int]]


class _Row(NamedTuple):
    """Texts to be tokenised part by part; of each answer also whether the format ends it, so that EOS does not."""

    prompt: list[str]
    answers: list[tuple[list[str], bool]]


class Encoder:
    """A fast tokenizer with the recipe's prompt format: `data.template`, else the chat template, else the default.

    Prompt and answer are tokenised apart, so that no token spans the boundary, and the prompt has the very ids that it
    has when the model is asked for an answer. Every answer ends with EOS, or with what the chat template ends a turn
    with. Only the format writes control tokens: what a record says is text, also where it says `<|im_end|>`.
    """

    def __init__(self, facts: TokenizerFacts, data: dict[str, Any]):
        """`data` holds template, answer_prefix, system and chat_variables of `config.Data`.

        Raises:
            Unusable: when the chat template cannot be used.
        """
        self._tokenizer = Tokenizer.from_str(facts.json)
        self._eos = facts.eos
        self._data = data
        self._adds_space = self._joins_with_a_space()
        self._chat = None
        if data["template"] is None and facts.chat_template:
            variables = {**facts.special, **data["chat_variables"]}
            self._chat = Chat(facts.chat_template, variables, self._messages("?"))
        self._template = data["template"] or DEFAULT_TEMPLATE
        self._control = self._control_tokens()
        self._own_control = functools.cache(lambda text: len(self._control.findall(text)))

    def encode(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Tokens | Unusable]:
        """Ids of each prompt, with the special tokens in front, and of its answers."""
        rendered = [self._try_render(prompt, texts) for prompt, texts in zip(prompts, answers, strict=True)]
        good = [item for item in rendered if not isinstance(item, Unusable)]
        heads = iter(self._heads([item.prompt for item in good]))
        tails = iter(self._tails([tail for item in good for tail in item.answers]))
        return [
            item if isinstance(item, Unusable) else Tokens(next(heads), [next(tails) for _ in item.answers])
            for item in rendered
        ]

    def render(self, prompt: Prompt, answer: str) -> tuple[str, str]:
        """The text of prompt and answer; the answer's includes what the chat template ends a turn with, but no EOS.

        Raises:
            Unusable: when the chat template refuses the messages or drops a text.
        """
        head, [tail] = self._pieces(prompt, [answer])
        return "".join(head), "".join(tail)

    def windows(self, text: str, prefix: int, continuation: int, overlap: int) -> list[Tokens]:
        """`text` cut into windows of tokens; the last one ends with the text and may share more with the one before.

        Raises:
            Unusable: when a control token in the text cannot be written as text.
        """
        start = _without_eos(self._tokenizer.encode("").ids, self._eos)  # BOS, for a tokenizer that has one
        ids = [token for part in self._middle(self._spelled(["", text, ""])) for token in part]
        size = prefix + continuation
        firsts = list(range(0, max(1, len(ids) - size + 1), size - overlap))
        if firsts[-1] + size < len(ids):
            firsts.append(len(ids) - size)
        windows = [ids[first : first + size] for first in firsts]
        # A text shorter than a window keeps a continuation of at least one token.
        cut = [min(prefix, max(1, len(window) - continuation), len(window) - 1) for window in windows]
        return [Tokens(start + w[:k], [w[k:]]) for w, k in zip(windows, cut, strict=True) if k > 0]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens shown."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _try_render(self, prompt: Prompt, answers: Sequence[str]) -> _Row | Unusable:
        try:
            head, tails = self._pieces(prompt, answers)
            return _Row(self._spelled(head), [(self._spelled(tail), bool(tail[-1].strip())) for tail in tails])
        except Unusable as reason:
            return reason

    def _pieces(self, prompt: Prompt, answers: Sequence[str]) -> tuple[Pieces, list[Pieces]]:
        if self._chat:
            return self._chat.turn(self._messages(prompt), answers)
        return self._plain(prompt), [["", self._data["answer_prefix"] + answer, ""] for answer in answers]

    def _heads(self, heads: list[list[str]]) -> list[list[int]]:
        firsts = self._tokenizer.encode_batch_fast([parts[0] for parts in heads], add_special_tokens=not self._chat)
        rest = iter(self._middle([part for parts in heads for part in parts[1:]]))
        return [
            _with_next(e.ids if self._chat else _without_eos(e.ids, self._eos), rest, len(parts) - 1)
            for e, parts in zip(firsts, heads, strict=True)
        ]

    def _tails(self, tails: list[tuple[list[str], bool]]) -> list[list[int]]:
        ids = iter(self._middle([part for parts, _ in tails for part in parts]))
        whole = [(_with_next(next(ids), ids, len(parts) - 1), ended) for parts, ended in tails]
        return [tail if ended else [*tail, self._eos] for tail, ended in whole]

    def _middle(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts as they stand in the middle of a sequence: no BOS, and no space put in front."""
        if not self._adds_space:
            return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        found: list[list[int] | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            missing = [i for i, ids in enumerate(found) if ids is None]
            before = self._tokenizer.encode(anchor, add_special_tokens=False).ids
            for i, encoding in zip(
                missing,
                self._tokenizer.encode_batch_fast([anchor + texts[i] for i in missing], add_special_tokens=False),
                strict=True,
            ):
                if encoding.ids[: len(before)] == before:
                    found[i] = encoding.ids[len(before) :]
            if None not in found:
                break
        return [
            ids if ids is not None else self._tokenizer.encode(text, add_special_tokens=False).ids
            for ids, text in zip(found, texts, strict=True)
        ]

    def _joins_with_a_space(self) -> bool:
        """Whether the tokenizer puts a space in front of each text, as SentencePiece's do."""
        ids = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b")]
        return self._tokenizer.decode(ids[0] + ids[1]) != "ab"

    def _control_tokens(self) -> re.Pattern[str]:
        """Texts that the tokenizer turns into control tokens.

        A token that is not marked as special is one where the format parts turns with it.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        texts = {token.content for number, token in added.items() if token.special or number == self._eos}
        in_format = self._chat.marks_turns if self._chat else self._template.__contains__
        words = {token.content for token in added.values()} - texts
        texts |= {word for word in words if re.search(r"[^\w\s]", word) and in_format(word)}
        longest_first = sorted(texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _spelled(self, pieces: Pieces) -> list[str]:
        """The text, cut within each control token that is not the format's own, so that none is read as one.

        Raises:
            Unusable: when one is a single character.
        """
        text = "".join(pieces)
        if len(self._control.findall(text)) == sum([self._own_control(piece) for piece in pieces[::2]]):
            return [text]
        ends = list(itertools.accumulate(map(len, pieces)))
        own = [(end - len(piece), end) for piece, end in list(zip(pieces, ends, strict=True))[::2]]
        parts, first, at = [], 0, 0
        while found := self._control.search(text, at):
            at = found.end()
            if any(start <= found.start() and found.end() <= end for start, end in own):
                continue
            at = found.start() + 1
            if at == found.end():
                raise Unusable(f"the special token {found[0]!r} cannot be written as text")
            parts.append(text[first:at])
            first = at
        return [*parts, text[first:]]

    def _plain(self, prompt: Prompt) -> Pieces:
        pieces, asked = [""], False
        for message in self._messages(prompt):
            role, content = message["role"], message["content"]
            between = "\n\n" if any(pieces) else ""
            if role == "assistant":
                pieces += [self._data["answer_prefix"] + content, ""]
            elif role == "user":
                first, *others = self._template.split("{prompt}")
                pieces[-1] += between + first
                for other in others:
                    pieces += [content, other]
            elif role == "system":
                pieces[-1] += between
                pieces += [content, ""]
            else:
                raise Unusable(f"role {role!r} needs a chat template")
            asked = role == "user"
        if not asked:
            raise Unusable("the messages before the answer do not end with a question")
        return pieces

    def _messages(self, prompt: Prompt) -> list[Message]:
        system = [{"role": "system", "content": self._data["system"]}] if self._data["system"] else []
        return system + ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt))


def _with_next(ids: list[int], rows: Iterator[list[int]], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, *next(rows)]
    return ids


def _without_eos(ids: list[int], eos: int) -> list[int]:
    """Ids without an EOS that the tokenizer puts at the end; a lone one is its BOS."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def answer_tokens_marked(encoder: Encoder, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The row as text, its answer in brackets and its answer tokens parted by bars; ␤ stands for a line end."""
    before, marks = encoder.decode(prompt), []
    done = before
    for count in range(1, len(answer) + 1):
        text = encoder.decode([*prompt, *answer[:count]])
        if not text.endswith("�"):  # else a character of several tokens, not whole yet
            marks.append(text[len(done) :])
            done = text
    shown = f"{before}[{'|'.join(marks)}]"
    return json.dumps(shown, ensure_ascii=False)[1:-1].replace("\\n", "␤").replace('\\"', '"')
