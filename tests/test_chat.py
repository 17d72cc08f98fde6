"""Chat templates of many habits: every text arrives, and the boundary between prompt and answer is where it belongs."""

from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from components.data.mapping import Message, Unusable
from components.data.prompts import Encoder, TokenizerFacts
from components.models import load_tokenizer, tokenizer_facts

TURN = "{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
EACH = "{% for m in messages %}"
END = "{% endfor %}"
CHAT = EACH + TURN + END + ASK
# An assistant's turn may have a thought in front, the last one always has; what a record says of it is not repeated.
OTHERS = EACH + "{% if m.role != 'assistant' %}" + TURN + "{% else %}"
THOUGHT_IN_LAST = (
    OTHERS + "{% set own = '</think>' in m.content %}"
    "{{ '<|start|>assistant\\n' }}{% if loop.last and not own %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|end|>\\n' }}{% endif %}" + END
)
NO_THOUGHT_IN_PAST = (
    EACH + "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<eos>' }}{% endif %}" + END
)
ASK_THOUGHT = "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
CHANNELS = (
    OTHERS
    + "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}"
    + END
    + "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
HEADINGS = EACH + "{{ '### ' + m.role + ': ' + m.content + '<eos>\\n' }}" + END
NUMBERED = EACH + "{{ loop.index ~ ') ' ~ m.content ~ '<eos>' }}" + END
BRACKETS = (
    EACH
    + (
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' <eos>' }}"
        "{% endif %}"
    )
    + END
)
SWITCHED = OTHERS + (
    "{{ '<|start|>assistant\\n</think>' + m.content + '<|end|>\\n' }}{% endif %}"
    + END
    + "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
QUESTION: list[Message] = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="session")
def facts(base: Path) -> TokenizerFacts:
    facts = tokenizer_facts(load_tokenizer(base))
    tokenizer = Tokenizer.from_str(facts.json)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>"])
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<think>", "</think>"])
    return facts._replace(json=tokenizer.to_str())


def encoder(facts: TokenizerFacts, template: str, system: str | None = None, **variables: Any) -> Encoder:
    data = {"template": None, "answer_prefix": " ", "system": system, "chat_variables": variables}
    return Encoder(facts._replace(chat_template=template), data)


def written(template: str, messages: list[Message], ask: bool, **variables: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=ask, **variables)


@pytest.mark.parametrize(
    ("template", "prompt_ends", "answered"),
    [
        pytest.param(CHAT, "<|end|>\n<|start|>assistant\n", "It is so.<|end|>", id="plain"),
        pytest.param(CHAT.removesuffix(ASK), "<|start|>assistant\n", "It is so.<|end|>", id="no generation prompt"),
        pytest.param(HEADINGS, "<eos>\n### assistant:", " It is so.<eos>", id="no generation prompt, a space"),
        pytest.param(NUMBERED, "1) What is it?<eos>2)", " It is so.<eos>", id="no generation prompt, numbers"),
        pytest.param(BRACKETS, "is it? [/INST]", " It is so. <eos>", id="nothing to generate behind, a space"),
        pytest.param(
            THOUGHT_IN_LAST + ASK, "assistant\n<think>\n\n</think>\n\n", "It is so.<|end|>", id="an empty thought"
        ),
        pytest.param(
            THOUGHT_IN_LAST + ASK.replace("nt\\n", "nt\\n<think>\\n"),
            "assistant\n<think>\n\n</think>\n\n",
            "It is so.<|end|>",
            id="a thought opened, an empty one written",
        ),
        pytest.param(
            NO_THOUGHT_IN_PAST + ASK_THOUGHT, "is it?<|assistant|>", "It is so.<eos>", id="a thought opened only"
        ),
        pytest.param(CHANNELS, "<|start|>assistant<|channel|>final<|message|>", "It is so.<|return|>", id="channels"),
    ],
)
def test_the_answer_is_what_was_answered_and_the_prompt_all_before_it(
    facts: TokenizerFacts, template: str, prompt_ends: str, answered: str
) -> None:
    made = encoder(facts, template)
    for question in ("What is it?", [{"role": "user", "content": "What is it?"}]):
        prompt, answer = made.render(question, "It is so.")
        assert prompt.endswith(prompt_ends)
        assert answer == answered
        # Together they are the finished conversation, as the template itself writes it.
        finished = written(template, [*QUESTION, {"role": "assistant", "content": "It is so."}], ask=False)
        assert prompt + answer == finished.rstrip()
    [tokens, other] = made.encode(["What is it?"] * 2, [["It is so."], ["No."]])
    assert tokens.prompt == other.prompt  # nothing of an answer is in it
    assert made.decode(tokens.answers[0]) == answered


def test_a_thought_that_an_answer_brings_along_is_answer(facts: TokenizerFacts) -> None:
    made = encoder(facts, THOUGHT_IN_LAST + ASK)
    answer = "<think>\nLet me see.\n</think>\n\nIt is so."
    prompt, answered = made.render("What is it?", answer)
    assert prompt.endswith("<|end|>\n<|start|>assistant\n")
    assert answered == answer + "<|end|>"
    [tokens] = made.encode(["What is it?"], [[answer]])
    assert Tokenizer.from_str(facts.json).token_to_id("<think>") in tokens.answers[0]  # as the model itself writes it
    [both] = made.encode(["What is it?"], [[answer, "No."]])
    assert "behind different prompts" in str(both)


def test_a_template_that_asks_otherwise_than_it_writes_is_refused_with_the_way_out(facts: TokenizerFacts) -> None:
    with pytest.raises(Unusable, match=r"asks .*<think>' and writes .*</think>': set data.chat_variables so"):
        encoder(facts, SWITCHED, thinking=True)
    made = encoder(facts, SWITCHED, thinking=False)
    assert made.render("What is it?", "So.") == (written(SWITCHED, QUESTION, ask=True), "So.<|end|>")


PARTS = (
    EACH
    + ("{{ '<|start|>' + m.role + '\\n' }}{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|end|>\\n' }}")
    + END
    + ASK
)
TYPED_PARTS = PARTS.replace("{{ part.text }}", "{% if part.type == 'text' %}{{ part['text'] | trim }}{% endif %}")
REFUSES_TEXT = "{% if messages[0].content is string %}{{ raise_exception('parts, please') }}{% endif %}" + PARTS


@pytest.mark.parametrize("template", [PARTS, TYPED_PARTS, REFUSES_TEXT], ids=["parts", "typed", "refuses text"])
def test_content_is_given_in_parts_to_templates_that_expect_it_so(facts: TokenizerFacts, template: str) -> None:
    assert encoder(facts, template, "S").render("Q", "A") == encoder(facts, CHAT, "S").render("Q", "A")


KNOWN_ROLES = EACH + "{% if m.role in ('user', 'assistant', 'system') %}" + TURN + "{% endif %}" + END + ASK


@pytest.mark.parametrize("role", ["developer", "tool", "function", "observation", "critic"])
@pytest.mark.parametrize("content", ["Weather: rain.", "user", "a"])  # also what stands in the rendered text anyway
def test_a_role_that_the_template_drops_is_named(facts: TokenizerFacts, role: str, content: str) -> None:
    made = encoder(facts, KNOWN_ROLES)
    dropped = [{"role": role, "content": content}, *QUESTION]
    first, second = made.encode([dropped, QUESTION], [["It rains."], ["So."]])
    assert f"text of role '{role}'" in str(first)
    assert not isinstance(second, Unusable)


def written_as(expression: str, template: str = CHAT) -> str:
    return template.replace("m.content", expression)


@pytest.mark.parametrize(
    ("template", "messages", "answer", "role"),
    [
        pytest.param(written_as("m.content[:12]"), ["A very long question?"], "So.", "user", id="cut"),
        pytest.param(written_as("m.content | upper"), ["What?"], "So.", None, id="other letters"),
        pytest.param(written_as("m.content.replace('<', '&lt;')"), ["Is 1 < 2?"], "So.", "user", id="escaped"),
        pytest.param(written_as("m.content.split('#')[0]"), ["What?"], "So. # Or not.", "assistant", id="split"),
        pytest.param(THOUGHT_IN_LAST + ASK, ["What?", "<think>hm</think>So.", "Why?"], "Thus.", "assistant", id="past"),
        pytest.param(
            EACH + "{% if loop.index > loop.length - 2 %}" + TURN + "{% endif %}" + END + ASK,
            ["A?", "B.", "C?"],
            "D.",
            "user",
            id="window",
        ),
    ],
)
def test_a_text_that_does_not_arrive_whole_sets_its_row_aside(
    facts: TokenizerFacts, template: str, messages: list[str], answer: str, role: str | None
) -> None:
    prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    if role is None:  # not even the probe arrives: the template is refused
        with pytest.raises(Unusable, match="drops or changes the text of role 'user'"):
            encoder(facts, template)
        return
    good, bad = encoder(facts, template).encode([QUESTION, prompt], [["So."], [answer]])
    assert not isinstance(good, Unusable)
    assert f"drops or changes the text of role '{role}'" in str(bad)


@pytest.mark.parametrize(
    "template",
    [
        "x",
        "<|start|>user\n<|end|>",
        written_as("m.text"),
        written_as("m.content.parts"),
        written_as("m.role", KNOWN_ROLES),
        CHAT + "{{ messages[-1].content }}",
        CHAT + "{{ messages[0].content }}",
    ],
)
def test_a_template_that_loses_a_text_or_the_order_is_refused(facts: TokenizerFacts, template: str) -> None:
    with pytest.raises(Unusable, match=r"drops or changes the text of role|refuses it|writes the answer twice, or"):
        encoder(facts, template)


@pytest.mark.parametrize("how", ["trim", "trim | trim('\\n')", "string | trim"])
@pytest.mark.parametrize("text", ["  Why?", "Why? \n", "\n\n Why? \t", "Why?", "a\n\nb "])
def test_templates_may_trim(facts: TokenizerFacts, how: str, text: str) -> None:
    made = encoder(facts, written_as(f"m.content | {how}"))
    prompt = f"<|start|>user\n{text.strip()}<|end|>\n<|start|>assistant\n"
    assert made.render(text, text) == (prompt, text.strip() + "<|end|>")
    for method in ("lstrip", "rstrip", "strip"):
        one_sided = encoder(facts, written_as(f"m.content.{method}('\\n')"))
        assert one_sided.render(text, "A")[0] == prompt.replace(text.strip(), getattr(text, method)("\n"))


def test_a_system_message_may_stand_in_the_first_question_or_only_where_it_is_asked(facts: TokenizerFacts) -> None:
    merged = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n\\n' %}{% else %}{% set s = '' %}"
        "{% endif %}" + EACH + "{% if m.role == 'user' %}{{ '[INST] ' + (s if LAST else '') + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<eos>' }}{% endif %}" + END
    )
    for place in ("true", "loop.last"):  # the second one leaves it out where the conversation is finished
        made = encoder(facts, merged.replace("LAST", place), "Be brief.")
        assert made.render("Q", "A") == ("[INST] Be brief.\n\nQ [/INST]", " A<eos>")


def test_an_empty_system_message_is_the_templates_affair(facts: TokenizerFacts) -> None:
    asked = [{"role": "system", "content": ""}, *QUESTION]
    assert encoder(facts, CHAT).render(asked, "A")[0] == written(CHAT, asked, ask=True)
    optional = EACH + "{% if m.content %}" + TURN + "{% endif %}" + END + ASK
    assert encoder(facts, optional).render(asked, "A")[0] == written(CHAT, QUESTION, ask=True)
    plain = Encoder(facts, {"template": "{prompt}:", "answer_prefix": " ", "system": None, "chat_variables": {}})
    assert plain.render(asked, "A") == ("What is it?:", " A")
