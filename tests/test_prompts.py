"""The boundary between prompt and answer, for three kinds of tokenizers and arbitrary text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from components.data.mapping import Unusable
from components.data.prompts import DEFAULT_TEMPLATE, Encoder, TokenizerFacts, answer_tokens_marked
from components.models import load_tokenizer, tokenizer_facts

PLAIN: dict[str, Any] = {"template": DEFAULT_TEMPLATE, "answer_prefix": " ", "system": None, "chat_variables": {}}
BARE = PLAIN | {"template": "{prompt}", "answer_prefix": ""}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
# Any text but the special tokens' own, and but "▁", which SentencePiece cannot tell from a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<|>"), max_size=60)
CHECK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def byte_level(base: Path) -> TokenizerFacts:
    return tokenizer_facts(load_tokenizer(base))


@pytest.fixture(scope="session")
def sentencepiece() -> TokenizerFacts:
    """BPE over the whole text with byte fallback, a space put in front and BOS, as Llama 2's is."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["Question: Where is it? Answer: It is in the town of Ilmarsh, I think.  So  there."] * 20
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(bpe.to_str())
    # Byte tokens belong to the vocabulary, not to the special tokens that text is searched for.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return TokenizerFacts(json.dumps(spec), 2)


@pytest.fixture(scope="session")
def chat(byte_level: TokenizerFacts) -> TokenizerFacts:
    tokenizer = Tokenizer.from_str(byte_level.json)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<bos>"])
    return TokenizerFacts(tokenizer.to_str(), byte_level.eos, CHAT, {"bos_token": "<bos>"})


_MADE: dict[tuple[str, str], tuple[Encoder, Tokenizer]] = {}


def made(facts: TokenizerFacts, data: dict[str, Any]) -> tuple[Encoder, Tokenizer]:
    """Encoder and tokenizer, made once: a real vocabulary takes half a second."""
    key = (facts.json, f"{facts.chat_template}{data}")
    if key not in _MADE:
        _MADE[key] = Encoder(facts, data), Tokenizer.from_str(facts.json)
    return _MADE[key]


def check(facts: TokenizerFacts, data: dict[str, Any], prompt: str, answer: str, bos: str = "") -> None:
    encoder, tokenizer = made(facts, data)
    [tokens] = encoder.encode([prompt], [[answer]])
    head, tail = tokens.prompt, tokens.answers[0]
    rendered_prompt, rendered_answer = encoder.render(prompt, answer)
    end = "" if facts.chat_template else tokenizer.id_to_token(facts.eos)
    assert encoder.decode(head) == bos + rendered_prompt
    assert encoder.decode(head + tail) == bos + rendered_prompt + rendered_answer + end
    # What the model is asked with is exactly the prompt: nothing of the answer is in it.
    assert encoder.encode([prompt], [["other"]])[0].prompt == head
    last = tokenizer.token_to_id("<|end|>") if facts.chat_template else facts.eos
    assert tail[-1] == last
    assert tail.count(last) == 1


@CHECK
@given(prompt=TEXT, answer=TEXT)
@pytest.mark.parametrize("data", [PLAIN, BARE])
def test_byte_level_bpe(byte_level: TokenizerFacts, data: dict[str, Any], prompt: str, answer: str) -> None:
    check(byte_level, data, prompt, answer)


@CHECK
@given(prompt=TEXT, answer=TEXT)
@pytest.mark.parametrize("data", [PLAIN, BARE])
def test_sentencepiece_bpe_with_byte_fallback(
    sentencepiece: TokenizerFacts, data: dict[str, Any], prompt: str, answer: str
) -> None:
    assume(prompt)  # of nothing, this tokenizer's decoder shows nothing; the row is set aside anyway
    check(sentencepiece, data, prompt, answer, bos="<s> ")


@CHECK
@given(prompt=TEXT, answer=TEXT)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_template(chat: TokenizerFacts, system: str | None, prompt: str, answer: str) -> None:
    assume(answer == answer.strip())
    data = PLAIN | {"template": None, "system": system}
    check(chat, data, prompt, answer)
    head, tail = made(chat, data)[0].render(prompt, answer)
    system_turn = "<|start|>system\nBe brief.<|end|>\n" if system else ""
    assert head == f"<bos>{system_turn}<|start|>user\n{prompt}<|end|>\n<|start|>assistant\n"
    assert tail == f"{answer}<|end|>"


@pytest.fixture(scope="session", params=["stories260K-hf", "gpt2-tokenizer"])
def real(shared: Path, request: pytest.FixtureRequest) -> TokenizerFacts:
    return tokenizer_facts(load_tokenizer(shared / request.param))


@CHECK
@given(prompt=TEXT, answer=TEXT)
def test_real_tokenizers(real: TokenizerFacts, prompt: str, answer: str) -> None:
    check(real, PLAIN, prompt, answer, bos="<s> " if "<0x0A>" in real.json else "")


def test_inner_turns_keep_their_ends(chat: TokenizerFacts) -> None:
    """No mask depends on a pad token, so the ends of earlier turns stay ordinary tokens of the prompt."""
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    encoder = Encoder(chat, PLAIN | {"template": None})
    [tokens] = encoder.encode([prompt], [["d"]])
    end = Tokenizer.from_str(chat.json).token_to_id("<|end|>")
    assert tokens.prompt.count(end) == 3
    assert encoder.decode(tokens.answers[0]) == "d<|end|>"


def test_messages_without_a_chat_template_repeat_the_recipes(byte_level: TokenizerFacts) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert Encoder(byte_level, PLAIN).render(prompt, "d") == ("Question: a\nAnswer: b\n\nQuestion: c\nAnswer:", " d")


def test_system_messages_without_a_chat_template_stand_in_front(byte_level: TokenizerFacts) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    expected = ("Be brief.\n\nQuestion: a\nAnswer:", " b")
    assert Encoder(byte_level, PLAIN).render(prompt, "b") == expected
    assert Encoder(byte_level, PLAIN | {"system": "Be brief."}).render("a", "b") == expected
    with pytest.raises(Unusable, match="role 'tool' needs a chat template"):
        Encoder(byte_level, PLAIN).render([{"role": "tool", "content": "x"}, prompt[1]], "b")


def test_windows_of_text_begin_with_bos_also_where_there_is_a_chat_template(sentencepiece: TokenizerFacts) -> None:
    for facts in (sentencepiece, sentencepiece._replace(chat_template=CHAT), sentencepiece._replace(eos=1)):
        [window] = Encoder(facts, PLAIN | {"template": None}).windows("It is in the town.", 64, 64, 0)
        assert window.prompt[0] == 1


def test_a_template_in_the_recipe_wins_over_the_tokenizers(chat: TokenizerFacts) -> None:
    assert Encoder(chat, PLAIN).render("a", "b") == ("Question: a\nAnswer:", " b")
    assert Encoder(chat._replace(chat_template=None), PLAIN | {"template": None}).render("a", "b")[1] == " b"


def test_a_template_that_ends_turns_with_nothing_gets_eos(byte_level: TokenizerFacts) -> None:
    facts = byte_level._replace(chat_template="{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    encoder = Encoder(facts, PLAIN | {"template": None})
    [tokens] = encoder.encode(["a"], [["b"]])
    assert encoder.decode(tokens.answers[0]) == "b <eos>"


def test_a_template_that_asks_the_date_gives_the_same_rows_every_day(byte_level: TokenizerFacts) -> None:
    template = "{% for m in messages %}{{ strftime_now('%d %b %Y') + m.content + '<eos>' }}{% endfor %}"
    facts = byte_level._replace(chat_template=template)
    assert Encoder(facts, PLAIN | {"template": None}).render("a", "b") == (
        "26 Jul 2024a<eos>26 Jul 2024",
        "b<eos>",
    )


def test_messages_that_the_template_refuses_are_set_aside_alone(byte_level: TokenizerFacts) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not so') }}{% endif %}"
        "{{ m.content + '<eos>' }}{% endfor %}"
    )
    encoder = Encoder(byte_level._replace(chat_template=template), PLAIN | {"template": None})
    good, bad, also_good = encoder.encode(["a", "no", "c"], [["x"], ["y"], ["z"]])
    assert isinstance(bad, Unusable)
    assert "not so" in str(bad)
    assert encoder.decode(good.answers[0] + also_good.answers[0]) == "x<eos>z<eos>"


def test_template_braces_in_the_prompt_are_left_alone(byte_level: TokenizerFacts) -> None:
    assert Encoder(byte_level, PLAIN | {"template": "{prompt}:"}).render("f{x} {prompt}", "a")[0] == "f{x} {prompt}:"


@pytest.mark.parametrize(("prefix", "continuation", "overlap"), [(3, 5, 0), (4, 4, 4), (1, 1, 0), (8, 8, 15)])
def test_windows_cover_the_text_and_overlap_as_asked(
    byte_level: TokenizerFacts, prefix: int, continuation: int, overlap: int
) -> None:
    encoder = Encoder(byte_level, PLAIN)
    text = "The town of Ilmarsh lies by the sea, and Zama was born there. " * 4
    whole = Tokenizer.from_str(byte_level.json).encode(text, add_special_tokens=False).ids
    windows = encoder.windows(text, prefix, continuation, overlap)
    size = prefix + continuation
    for k, window in enumerate(windows):
        first = min(k * (size - overlap), len(whole) - size)
        assert window.prompt == whole[first : first + prefix]
        assert window.answers == [whole[first + prefix : first + size]]
    assert windows[-1].answers[0][-1] == whole[-1]


def test_a_text_shorter_than_a_window_is_one(sentencepiece: TokenizerFacts) -> None:
    encoder = Encoder(sentencepiece, PLAIN)
    [window] = encoder.windows("It is in the town.", 64, 64, 0)
    assert window.prompt[0] == 1  # BOS
    assert encoder.decode(window.prompt + window.answers[0]) == "<s>It is in the town."
    assert len(window.answers[0]) >= 1
    assert encoder.windows("", 64, 64, 0) == []


def test_the_preview_marks_answer_tokens_whole_characters_at_a_time(byte_level: TokenizerFacts) -> None:
    encoder = Encoder(byte_level, PLAIN)
    [tokens] = encoder.encode(["a\nb"], [["é 漢"]])
    shown = answer_tokens_marked(encoder, tokens.prompt, tokens.answers[0])
    assert shown.startswith("Question: a␤b␤Answer:[ ")
    assert shown.replace("|", "").endswith("[ é 漢<eos>]")


SPECIAL = ("<pad>", "<eos>", "<bos>", "<|start|>", "<|end|>", "<unk>", "<s>", "</s>", "<|endoftext|>")
# Special tokens whole, nested, cut and side by side, among other text.
RECORD = st.lists(st.sampled_from([*SPECIAL, *"<|>", "<eo", "s>", "|end", " ", "\n", "It ends", "é漢"]), max_size=12)


def control_ids(facts: TokenizerFacts) -> set[int]:
    added = made(facts, PLAIN)[1].get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special}


def check_record(facts: TokenizerFacts, data: dict[str, Any], prompt: str, answer: str) -> None:
    """The text comes back, and the only control tokens are those that a harmless record gets too."""
    encoder, _ = made(facts, data)
    [tokens, harmless] = encoder.encode([prompt, "Q"], [[answer], ["A"]])
    head, tail = encoder.render(prompt, answer)
    end = "" if facts.chat_template else encoder.decode([facts.eos])
    assert encoder.decode(tokens.prompt).endswith(head)
    assert encoder.decode(tokens.prompt + tokens.answers[0]).endswith(head + tail + end)
    control = control_ids(facts)
    for ids, expected in zip([tokens.prompt, *tokens.answers], [harmless.prompt, *harmless.answers], strict=True):
        assert [i for i in ids if i in control] == [i for i in expected if i in control]


@settings(CHECK, max_examples=100)
@given(prompt=RECORD.map("".join), answer=RECORD.map("".join))
@pytest.mark.parametrize("data", [PLAIN, BARE, PLAIN | {"system": "Never say <eos> or </s>.", "answer_prefix": " <s>"}])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "chat"])
def test_special_tokens_in_a_record_are_text(
    request: pytest.FixtureRequest, kind: str, data: dict[str, Any], prompt: str, answer: str
) -> None:
    assume(prompt.strip() and answer.strip())
    facts = request.getfixturevalue(kind)
    check_record(facts, data | ({"template": None} if facts.chat_template else {}), prompt, answer)


@settings(CHECK, max_examples=100)
@given(prompt=RECORD.map("".join), answer=RECORD.map("".join))
def test_special_tokens_in_a_record_are_text_to_real_tokenizers(real: TokenizerFacts, prompt: str, answer: str) -> None:
    assume(prompt.strip() and answer.strip())
    check_record(real, PLAIN, prompt, answer)


@pytest.mark.parametrize(
    "answer", ["It ends <eos> here.", "It ends.<eos>", "<eos><eos>", "a<pad>b<eos>c", "<e<eos>os>"]
)
def test_eos_is_in_an_answer_once_at_its_end(byte_level: TokenizerFacts, answer: str) -> None:
    encoder = Encoder(byte_level, PLAIN)
    [tokens] = encoder.encode([f"What of {answer}?"], [[answer]])
    assert tokens.answers[0].count(1) == 1
    assert tokens.answers[0][-1] == 1
    assert {0, 1}.isdisjoint(tokens.prompt + tokens.answers[0][:-1])
    assert encoder.decode(tokens.answers[0]) == f" {answer}<eos>"
    assert encoder.decode(tokens.prompt) == f"Question: What of {answer}?\nAnswer:"


@pytest.mark.parametrize("text", ["One.<eos>Two.", "<s> One <unk> two </s>", "<<eos>eos> and <pad><pad>", "</s>"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_special_tokens_in_a_book_are_text(request: pytest.FixtureRequest, kind: str, text: str) -> None:
    facts = request.getfixturevalue(kind)
    encoder = Encoder(facts, PLAIN)
    windows = encoder.windows(text * 5, 4, 4, 0)
    bos = 1 if kind == "sentencepiece" else 0
    assert all(len([i for i in w.prompt + w.answers[0] if i in control_ids(facts)]) == bos for w in windows)
    [whole] = encoder.windows(text * 5, 500, 500, 0)
    assert encoder.decode((whole.prompt + whole.answers[0])[bos:]) == text * 5


def test_a_control_token_of_one_character_sets_its_row_aside(byte_level: TokenizerFacts) -> None:
    tokenizer = Tokenizer.from_str(byte_level.json)
    tokenizer.add_special_tokens(["\ue000"])
    encoder = Encoder(byte_level._replace(json=tokenizer.to_str()), PLAIN)
    bad, good = encoder.encode(["a\ue000b", "ab"], [["c"], ["c"]])
    assert "cannot be written as text" in str(bad)
    assert not isinstance(good, Unusable)
    with pytest.raises(Unusable, match="cannot be written as text"):
        encoder.windows("a\ue000b", 4, 4, 0)


def test_the_formats_own_control_tokens_stay_what_they_are(chat: TokenizerFacts) -> None:
    """Of a template in the recipe as of the tokenizer's; also those that are not marked as special."""
    tokenizer = Tokenizer.from_str(chat.json)
    tokenizer.add_tokens(["<|user|>", "<|bot|>", "<think>"])
    ids = {name: tokenizer.token_to_id(name) for name in ("<|start|>", "<|end|>", "<|user|>", "<|bot|>", "<think>")}
    facts = chat._replace(json=tokenizer.to_str())
    recipes = PLAIN | {"template": "<|user|>{prompt}<|end|><|bot|>", "answer_prefix": ""}
    templates = facts._replace(
        chat_template="{% for m in messages %}{{ ('<|bot|>' if m.role == 'assistant' else '<|user|>') + m.content }}"
        "{{ '<eos>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|><think>' }}{% endif %}"
    )
    said = "<|user|>Hi<|end|><|bot|><think>Yo<|start|>"
    for encoder in (Encoder(facts, recipes), Encoder(templates, recipes | {"template": None})):
        [tokens] = encoder.encode([said], [[said]])
        turns = [ids["<|user|>"], ids["<|end|>"], ids["<|bot|>"]]
        assert [i for i in tokens.prompt if i in ids.values() and i != ids["<think>"]] == turns
        assert [i for i in tokens.answers[0] if i in {*ids.values(), facts.eos}] == [ids["<think>"], facts.eos]
        assert encoder.decode(tokens.prompt + tokens.answers[0]) == f"<|user|>{said}<|end|><|bot|>{said}<eos>"
