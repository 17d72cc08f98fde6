"""Text → token ids with an exact boundary between prompt and answer."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from components.data.mapping import Prompt, Unusable

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer:"
# What a chat template that asks for the date is told, so that rows are the same every day.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form "
    + " ".join(f'| replace("{code}", "{value}")' for code, value in _DATE.items())
    + " }}{%- endmacro -%}"
)
_ANCHORS = "\n:0é"  # characters that an answer is tokenised behind where the tokenizer would put a space in front of it
_PROBE = "xyzzy"


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


class Encoder:
    """A fast tokenizer with the recipe's prompt format: `data.template`, else the chat template, else the default.

    Prompt and answer are tokenised apart, so that no token spans the boundary, and the prompt has the very ids that it
    has when the model is asked for an answer. Every answer ends with EOS, or with what the chat template ends a turn
    with.
    """

    def __init__(self, facts: TokenizerFacts, data: dict[str, Any]):
        """`data` holds template, answer_prefix, system and chat_variables of `config.Data`."""
        self._tokenizer = Tokenizer.from_str(facts.json)
        self._eos = facts.eos
        self._data = data
        self._adds_space = self._joins_with_a_space()
        self._chat = _chat_renderer(facts, data) if data["template"] is None and facts.chat_template else None
        self._template = data["template"] or DEFAULT_TEMPLATE
        self._turn_end = self._find_turn_end() if self._chat else ""

    def encode(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Tokens | Unusable]:
        """Ids of each prompt, with the special tokens in front, and of its answers."""
        rendered = [self._try_render(prompt, texts) for prompt, texts in zip(prompts, answers, strict=True)]
        good = [item for item in rendered if not isinstance(item, Unusable)]
        heads = iter(self._heads([head for head, _ in good]))
        tails = iter(self._tails([tail for _, tails in good for tail in tails]))
        return [
            item if isinstance(item, Unusable) else Tokens(next(heads), [next(tails) for _ in item[1]])
            for item in rendered
        ]

    def render(self, prompt: Prompt, answer: str) -> tuple[str, str]:
        """The text of prompt and answer; the answer's includes what the chat template ends a turn with, but no EOS.

        Raises:
            Unusable: when the chat template refuses the messages.
        """
        if not self._chat:
            return self._plain(prompt), self._data["answer_prefix"] + answer
        messages = self._messages(prompt)
        head = self._chat(messages, True)
        whole = self._chat([*messages, {"role": "assistant", "content": answer}], False)
        if not whole.startswith(head):  # a template that writes past turns otherwise than the one to come
            return head, answer + self._turn_end
        tail = whole[len(head) :]
        return head, tail.rstrip() if self._turn_end else tail

    def windows(self, text: str, prefix: int, continuation: int, overlap: int) -> list[Tokens]:
        """`text` cut into windows of tokens; the last one ends with the text and may share more with the one before."""
        start = _without_eos(self._tokenizer.encode("").ids, self._eos)  # BOS, for a tokenizer that has one
        ids = self._middle([text])[0]
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

    def _try_render(self, prompt: Prompt, answers: Sequence[str]) -> tuple[str, list[str]] | Unusable:
        try:
            pairs = [self.render(prompt, answer) for answer in answers]
        except Unusable as reason:
            return reason
        return pairs[0][0], [tail for _, tail in pairs]

    def _heads(self, texts: list[str]) -> list[list[int]]:
        ids = [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._chat is None)]
        return ids if self._chat else [_without_eos(row, self._eos) for row in ids]

    def _tails(self, texts: list[str]) -> list[list[int]]:
        ended = bool(self._turn_end)
        return [ids if ended or (ids and ids[-1] == self._eos) else [*ids, self._eos] for ids in self._middle(texts)]

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

    def _plain(self, prompt: Prompt) -> str:
        text, asked = "", False
        for message in self._messages(prompt):
            role, content = message["role"], message["content"]
            between = "\n\n" if text else ""
            if role == "assistant":
                text += self._data["answer_prefix"] + content
            elif role == "user":
                text += between + self._template.replace("{prompt}", content)
            elif role == "system":
                text += between + content
            else:
                raise Unusable(f"role {role!r} needs a chat template")
            asked = role == "user"
        if not asked:
            raise Unusable("the messages before the answer do not end with a question")
        return text

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._data["system"]}] if self._data["system"] else []
        return system + ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt))

    def _find_turn_end(self) -> str:
        """What the chat template writes behind an answer, such as `<|im_end|>`; empty when it writes nothing."""
        assert self._chat
        whole = self._chat([*self._messages("?"), {"role": "assistant", "content": _PROBE}], False)
        return whole.rpartition(_PROBE)[2].strip()


def _without_eos(ids: list[int], eos: int) -> list[int]:
    """Ids without an EOS that the tokenizer puts at the end; a lone one is its BOS."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _chat_renderer(facts: TokenizerFacts, data: dict[str, Any]) -> Callable[[list[dict[str, str]], bool], str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list[dict[str, str]], ask: bool) -> str:
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=_FIXED_DATE + str(facts.chat_template), add_generation_prompt=ask,
                **{**facts.special, **data["chat_variables"]},
            )  # fmt: skip
        except Exception as error:  # whatever the template raises is about these messages
            raise Unusable(f"chat template refuses it: {str(error)[:100]}") from None
        return rendered[0][0]

    return render


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
