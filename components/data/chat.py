"""What a chat template writes around the messages, found by letting it write placeholders in place of their texts.

A template may drop a text, write past turns differently from the one to come, or open an answer with a thought. Where
each text stands is therefore checked on every row, and the boundary between prompt and answer follows from it.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from components.data.mapping import Message, Unusable

Pieces = list[str]
"""A text in pieces, by turns the format's own and what a record says; the first and the last are the format's."""

# What a template that asks for the date is given, so that rows are the same every day.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form "
    + " ".join(f'| replace("{code}", "{value}")' for code, value in _DATE.items())
    + " }}{%- endmacro -%}"
)
_PLACEHOLDER = re.compile(r"xyzzy(\d+)yzzyx")

_Shape = tuple[tuple[str, bool], ...]  # of each message its role, and whether it has a text


class _Frame(NamedTuple):
    """What the template writes around messages of one shape."""

    literals: Pieces
    """Its own texts before, between and behind those of the messages, when it asks for an answer."""
    order: list[int]
    """Which message's text stands behind each literal but the last."""
    header: str
    """What a finished conversation has between the last of these texts and the answer."""
    boundary: tuple[str, str]
    """What of the header ends the prompt, and what is left to stand in front of the answer."""
    after: str
    """What a finished conversation has behind the answer."""


class Chat:
    """A chat template that puts texts where they can be found again."""

    def __init__(self, template: str, variables: dict[str, Any], probe: Sequence[Message]):
        """Find out whether the template expects the content of messages as text or as parts.

        Raises:
            Unusable: when it can write neither form of the messages of `probe`.
        """
        self._template, self._variables = _FIXED_DATE + template, variables
        self._probe = _shape(probe)
        self._frame = functools.lru_cache(maxsize=1024)(self._find_frame)
        reasons = []
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                self._frame(self._probe)
                return
            except Unusable as reason:
                reasons.append(reason)
        raise reasons[0]

    def turn(self, messages: Sequence[Message], answers: Sequence[str]) -> tuple[Pieces, list[Pieces]]:
        """(the prompt, each answer with what ends its turn).

        The prompt is what the model is asked with, and ends where finished conversations begin to differ.

        Raises:
            Unusable: when the template refuses the messages, drops the text of one, or writes a finished answer
                behind something else than it asks with.
        """
        frame = self._frame(_shape(messages))
        asked = self._render(messages, ask=True)
        *before, opening = _filled(frame, messages, asked)
        start = asked.removesuffix(opening)
        found = [self._answer(frame, start, messages, answer) for answer in answers]
        ends = {end for end, _ in found}
        if len(ends) > 1:
            raise Unusable("chat template writes the answers to one question behind different prompts")
        return [*before, *ends], [answer for _, answer in found]

    def marks_turns(self, text: str) -> bool:
        """Whether the template writes `text` around every turn, rather than in a thought or by chance."""
        return all(text in written for written in self._turns)

    @functools.cached_property
    def _turns(self) -> tuple[str, str]:
        """A question, and a finished exchange with another question behind it."""
        asked = self._render(_placeholders(self._probe), ask=True)
        with suppress(Unusable):
            shape = (*self._probe, ("assistant", True), ("user", True))
            return asked, self._render(_placeholders(shape), ask=False)
        return "", ""

    def _answer(self, frame: _Frame, start: str, messages: Sequence[Message], answer: str) -> tuple[str, Pieces]:
        """(what ends the prompt behind the last message's text, the answer's pieces)."""
        whole = self._render([*messages, {"role": "assistant", "content": answer}], ask=False)
        opening, after = frame.literals[-1], frame.after.rstrip() or frame.after
        for said in _stripped(answer):
            if whole.endswith(frame.header + said + frame.after):
                end, lead = frame.boundary
                return end, [lead, said, after]
        # An answer that brings its own thought is not written behind the empty one that others get.
        for said in _stripped(answer):
            header = whole.removesuffix(said + frame.after).removeprefix(start)
            if start + header + said + frame.after == whole and opening.startswith(header.rstrip()):
                end, lead = _boundary(opening, header)
                return end, [lead, said, after]
        raise _dropped("assistant")

    def _find_frame(self, shape: _Shape) -> _Frame:
        messages, last = _placeholders((*shape, ("assistant", True))), str(len(shape))
        asked = _PLACEHOLDER.split(self._render(messages[:-1], ask=True))
        for i, (role, has_text) in enumerate(shape):
            if has_text and str(i) not in asked[1::2]:
                raise _dropped(role)
        finished = _PLACEHOLDER.split(self._render(messages, ask=False))
        if last not in finished[1::2]:
            raise _dropped("assistant")
        if finished[1::2].index(last) != len(finished[1::2]) - 1:
            raise Unusable("chat template writes the answer twice, or what was said before it behind it")
        *_, header, _, after = finished
        return _Frame(asked[::2], [int(i) for i in asked[1::2]], header, _boundary(asked[-1], header), after)

    def _render(self, messages: Sequence[Message], *, ask: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        shown: list[Any] = list(messages)
        if self._as_parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            rendered: Any = render_jinja_template(
                [shown], chat_template=self._template, add_generation_prompt=ask, **self._variables
            )
        except Exception as error:  # whatever the template raises is about these messages
            raise Unusable(f"chat template refuses it: {str(error)[:100]}") from None
        return rendered[0][0]


def _shape(messages: Sequence[Message]) -> _Shape:
    return tuple((message["role"], bool(message["content"])) for message in messages)


def _placeholders(shape: _Shape) -> list[Message]:
    return [{"role": role, "content": f"xyzzy{i}yzzyx" if has_text else ""} for i, (role, has_text) in enumerate(shape)]


def _filled(frame: _Frame, messages: Sequence[Message], rendered: str) -> Pieces:
    """`rendered` in pieces.

    Raises:
        Unusable: when it is not the frame with the texts of the messages in it.
    """
    pieces = [frame.literals[0]]
    at = len(pieces[0]) if rendered.startswith(pieces[0]) else len(rendered) + 1
    for which, literal in zip(frame.order, frame.literals[1:], strict=True):
        role, content = messages[which]["role"], messages[which]["content"]
        said = next((said for said in _stripped(content) if rendered.startswith(said + literal, at)), None)
        if said is None:
            raise _dropped(role)
        pieces += [said, literal]
        at += len(said) + len(literal)
    if at != len(rendered):
        raise _dropped(messages[frame.order[-1] if frame.order else -1]["role"])
    return pieces


def _stripped(text: str) -> Iterator[str]:
    """The text, and what templates make of it that trim the content of messages."""
    yield text
    for characters in (None, "\n"):
        yield text.strip(characters)
        yield text.lstrip(characters)
        yield text.rstrip(characters)


def _boundary(opening: str, header: str) -> tuple[str, str]:
    """Where the prompt ends: (what ends it, what is left to stand in front of the answer).

    `opening` is what the template asks for an answer with, `header` what it writes in front of a finished one. The
    prompt is what both have in common, with the rest of the header, such as an empty thought. Spaces go to the
    answer, as tokens have them in front; a thought that is only opened belongs to neither.

    Raises:
        Unusable: when both go on differently.
    """
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opening, header, strict=False)))
    asks, writes = opening[same:], header[same:]
    if asks.strip() and writes.strip():
        raise Unusable(
            f"chat template asks for an answer with {opening[-40:]!r} and writes a finished one behind "
            f"{header[-40:]!r}: set data.chat_variables so that both agree, such as enable_thinking: false"
        )
    end = header.rstrip(" ") if writes.strip() else header[:same]
    return end, header[len(end) :]


def _dropped(role: str) -> Unusable:
    return Unusable(f"chat template drops or changes the text of role {role!r}")
