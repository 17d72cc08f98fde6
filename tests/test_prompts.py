from pathlib import Path

import pytest
from tokenizers import Tokenizer

from components.data.prompts import Encoder
from components.models import load_tokenizer, tokenizer_facts

TEXTS = [("Who is it?", "Zama Polstad."), ("a", "b"), ("Naïve\ncafé?", "x  y\tz "), ("1+1=", "2")]


def check(encoder: Encoder, tokenizer, prompt: str, answer: str) -> None:
    head, tail = encoder.prompt(prompt), encoder.answer(prompt, answer)
    assert tail[-1] == encoder.eos
    assert tail.count(encoder.eos) == 1
    rendered = encoder.template.replace("{prompt}", prompt)
    decoded = tokenizer.decode(head + tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded == rendered + encoder.answer_prefix + answer
    assert tokenizer.decode(head, skip_special_tokens=True, clean_up_tokenization_spaces=False) == rendered


@pytest.mark.parametrize(("prompt", "answer"), TEXTS)
def test_boundary_is_exact_for_byte_level_bpe(base: Path, prompt: str, answer: str) -> None:
    tokenizer = load_tokenizer(base)
    facts = tokenizer_facts(tokenizer)
    check(
        Encoder(Tokenizer.from_str(facts.json), facts.eos, "Question: {prompt}\nAnswer:", " "),
        tokenizer,
        prompt,
        answer,
    )
    # A template without any boundary in the text: prompt and answer would merge if tokenised together.
    check(Encoder(Tokenizer.from_str(facts.json), facts.eos, "{prompt}", ""), tokenizer, prompt, answer)


@pytest.mark.parametrize("name", ["stories260K-hf", "gpt2-tokenizer"])
@pytest.mark.parametrize(("prompt", "answer"), TEXTS)
def test_boundary_is_exact_for_real_tokenizers(shared: Path, name: str, prompt: str, answer: str) -> None:
    tokenizer = load_tokenizer(shared / name)
    facts = tokenizer_facts(tokenizer)
    encoder = Encoder(Tokenizer.from_str(facts.json), facts.eos, "Question: {prompt}\nAnswer:", " ")
    check(encoder, tokenizer, prompt, answer)
    if name == "stories260K-hf":
        assert encoder.prompt(prompt)[0] == tokenizer.bos_token_id


def test_template_braces_in_the_prompt_are_left_alone(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    facts = tokenizer_facts(tokenizer)
    encoder = Encoder(Tokenizer.from_str(facts.json), facts.eos, "{prompt}:", " ")
    assert tokenizer.decode(encoder.prompt("f{x} {prompt}")) == "f{x} {prompt}:"
