"""A model's own answers: what a checkpoint wishes for does not move them, and no batch does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from components.errors import ConfigError
from components.evaluation.scoring import Asked, Scorer
from components.generation import answer_text, find_batching, generate_answers, own_generation
from components.load_config import load_recipe
from components.models import context_length, load_model, load_tokenizer
from pipelines.finetune import check_context
from tests.families import by_hand, tiny_folder

DEMO = str(Path(__file__).parents[1] / "pipelines" / "recipes" / "demo.yaml")
NEW = 8
LENGTHS = (23, 5, 12, 17, 9)
WISHES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "num_beams": {"num_beams": 4, "length_penalty": 2.0},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(2, 200)]},
    "suppress_tokens": {"suppress_tokens": list(range(2, 200))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 390))},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "sequence_bias": {"sequence_bias": [[[9], 100.0]]},
    "stop_strings": {"stop_strings": ["a", "e", " "]},
    "guidance_scale": {"guidance_scale": 20.0},
    "watermarking_config": {"watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.1}},
    "max_time": {"max_time": 1e-9},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "token_healing": {"token_healing": True},
    "warpers": {"do_sample": True, "min_p": 0.99, "typical_p": 0.01, "epsilon_cutoff": 0.9, "top_h": 0.01, "top_k": 1},
}
"""Contents of generation_config.json, each of which changes an answer of transformers' own, or ends it in an error."""


def prompts(vocabulary: int = 400) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocabulary, (length,), generator=numbers).tolist() for length in LENGTHS]


def asked(folder: Path, questions: list[list[int]], new: int = NEW, samples: int = 0) -> tuple[list[str], Any]:
    """(greedy answers, drawn ones) as an evaluation gets them."""
    rows = pa.table({"input_ids": questions, "answers": [[[5, 6]]] * len(questions)})
    found = Scorer(str(folder), "fp32", Asked(new, samples, 1.0, False))(rows)
    return found["generated"].to_pylist(), found["sampled"].to_pylist() if samples else None


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers differ, without generation_config.json."""
    folder = tiny_folder("llama", base, tmp_path_factory.mktemp("plain") / "model")
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def plain_answers(plain: Path) -> tuple[list[str], Any]:
    return asked(plain, prompts(), samples=2)


def test_answers_are_the_likeliest_tokens(plain: Path, plain_answers: tuple[list[str], Any]) -> None:
    model, tokenizer = load_model(plain), load_tokenizer(plain)
    assert plain_answers[0] == [answer_text(tokenizer, by_hand(model, prompt, NEW), [1]) for prompt in prompts()]
    assert len(set(plain_answers[0])) == len(LENGTHS)


@pytest.mark.parametrize("wish", WISHES)
def test_no_wish_of_the_checkpoint_moves_an_answer(
    wish: str, plain: Path, plain_answers: tuple[list[str], Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **WISHES[wish]}))
    assert asked(folder, prompts(), samples=2) == plain_answers
    assert obeyed(folder) != obeyed(plain)


def obeyed(folder: Path) -> list[Any]:
    """What transformers makes of two prompts, greedily and drawn, with the checkpoint's wishes; or why it cannot."""
    model = load_model(folder)
    batch = torch.tensor([prompts()[0], prompts()[0][::-1]])
    found: list[Any] = []
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}):
        torch.manual_seed(0)
        try:
            ids = model.generate(input_ids=batch, max_new_tokens=NEW, pad_token_id=1, **how)
            found.append(ids.tolist() if isinstance(ids, torch.Tensor) else type(ids))
        except ValueError as error:  # it lacks something that the wish needs
            found.append(str(error))
    return found


def test_wishes_in_an_old_config_do_not_move_an_answer(
    plain: Path, plain_answers: tuple[list[str], Any], tmp_path: Path
) -> None:
    """Older checkpoints have them in config.json, from which transformers makes a generation_config."""
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    wishes = {"repetition_penalty": 3.0, "min_length": 100, "num_beams": 3, "bad_words_ids": [[9]], "top_k": 1}
    (folder / "config.json").write_text(json.dumps({**config, **wishes}))
    assert load_model(folder).generation_config.repetition_penalty == 3.0
    assert asked(folder, prompts(), samples=2) == plain_answers


ENDS = {
    "generation_config": lambda end: ({"eos_token_id": end}, {}, None),
    "list in generation_config": lambda end: ({"eos_token_id": [1, end]}, {}, None),
    "config": lambda end: (None, {"eos_token_id": end}, None),
    "list in config": lambda end: (None, {"eos_token_id": [1, end]}, None),
    "config beside generation_config": lambda end: ({"eos_token_id": 1}, {"eos_token_id": [end]}, None),
    "tokenizer": lambda end: ({"eos_token_id": 1}, {}, end),
    "min_new_tokens": lambda end: ({"eos_token_id": [end, 1], "min_new_tokens": NEW}, {}, None),
    "length penalty": lambda end: ({"eos_token_id": end, "exponential_decay_length_penalty": [0, 9.0]}, {}, None),
    "out of the vocabulary": lambda end: ({"eos_token_id": [end, 99_999, -1]}, {}, None),
}
"""Where a checkpoint names `end` as a token that ends an answer: generation_config, config, tokenizer."""


@pytest.mark.parametrize("where", ENDS)
def test_every_eos_that_the_checkpoint_names_ends_an_answer(where: str, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    answers = [by_hand(model, prompt, NEW) for prompt in prompts()]
    end = answers[0][3]
    of_generation, of_config, of_tokenizer = ENDS[where](end)
    if of_generation:
        (folder / "generation_config.json").write_text(json.dumps(of_generation))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **of_config}))
    if of_tokenizer:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(of_tokenizer)
        tokenizer.save_pretrained(folder)
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in answers]
    expected = [answer_text(tokenizer, ids, [1]) for ids in cut]
    assert len(cut[0]) <= 3
    assert asked(folder, prompts())[0] == expected


def test_a_batch_that_goes_on_after_an_answer_has_ended_leaves_no_trace(plain: Path) -> None:
    tokenizer = load_tokenizer(plain)
    assert answer_text(tokenizer, [40, 41, 7, 42, 1], [1, 7]) == answer_text(tokenizer, [40, 41], [])
    assert answer_text(tokenizer, [7, 40], [7]) == ""
    assert answer_text(tokenizer, [40, 41], [7]) == answer_text(tokenizer, [40, 41], [])


BATCHING = {
    "llama": "padded",
    "gpt2": "padded",
    "opt": "padded",
    "mamba": "padded",
    "bloom": "padded",
    "gpt_oss": "padded",
    "rwkv": "one by one",
    "minimax": "equal lengths",
}


@pytest.mark.parametrize("family", BATCHING)
def test_answers_in_a_batch_are_those_given_alone(family: str, base: Path, tmp_path: Path) -> None:
    folder = tiny_folder(family, base, tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = [answer_text(tokenizer, by_hand(model, prompt, NEW), [1]) for prompt in prompts()]
    assert asked(folder, prompts())[0] == expected
    own_generation(model, tokenizer)
    assert find_batching(model) == BATCHING[family]


def without_mask(forward: Any) -> Any:
    return lambda self, *args, attention_mask=None, **kwargs: forward(self, *args, **kwargs)


def without_positions(forward: Any) -> Any:
    return lambda self, *args, position_ids=None, **kwargs: forward(self, *args, **kwargs)


def no_padding(forward: Any) -> Any:
    def refuse(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("padding is not supported")
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    return refuse


def one_row_only(forward: Any) -> Any:
    def refuse(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[0] > 1:
            raise RuntimeError("one row at a time")
        return forward(self, input_ids=input_ids, **kwargs)

    return refuse


def mixed(forward: Any) -> Any:
    def mix(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits - 3 * found.logits.mean(0, keepdim=True) * (found.logits.shape[0] > 1)
        return found

    return mix


@pytest.mark.parametrize(
    ("kind", "change", "batching"),
    [
        (LlamaForCausalLM, without_mask, "equal lengths"),
        (GPT2LMHeadModel, without_mask, "equal lengths"),
        (GPT2LMHeadModel, without_positions, "equal lengths"),
        (LlamaForCausalLM, no_padding, "equal lengths"),
        (LlamaForCausalLM, one_row_only, "one by one"),
        (GPT2LMHeadModel, mixed, "one by one"),
    ],
)
def test_a_model_that_bears_no_batch_is_asked_otherwise(
    kind: Any, change: Any, batching: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out by trying: whatever the reason, the answers are those given alone, drawn ones included."""
    folder = tiny_folder("gpt2" if kind is GPT2LMHeadModel else "llama", base, tmp_path / "model")
    monkeypatch.setattr(kind, "forward", change(kind.forward))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    own_generation(model, tokenizer)
    assert find_batching(model, prompts()[0]) == batching
    questions = [*prompts(), prompts()[2][::-1]]
    greedy, drawn = asked(folder, questions, samples=2)
    assert greedy == [answer_text(tokenizer, by_hand(model, prompt, NEW), [1]) for prompt in questions]
    assert all(one != other for one, other in drawn)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_prompt_near_the_end_of_the_context_shortens_no_other_answer(family: str, base: Path, tmp_path: Path) -> None:
    folder = tiny_folder(family, base, tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    long = [(7 * i) % 390 + 2 for i in range(125)]
    questions = [long, *prompts()]
    answers = asked(folder, questions)[0]
    lengths = [3] + [NEW] * len(LENGTHS)
    expected = [by_hand(model, prompt, length) for prompt, length in zip(questions, lengths, strict=True)]
    assert answers == [answer_text(tokenizer, ids, [1]) for ids in expected]
    ends = own_generation(model, tokenizer)
    full = generate_answers(model, tokenizer, [[*long, 7, 8, 9], *prompts()], [0, *lengths[1:]], "padded", ends)
    assert full == [[""], *([answer] for answer in answers[1:])]


CONTEXTS = {
    "gemma3": ({"text_config": {"max_position_embeddings": 96}}, 96),
    "llama4": ({"text_config": {"max_position_embeddings": 97}}, 97),
    "dbrx": ({"max_seq_len": 98}, 98),
    "mpt": ({"max_seq_len": 99}, 99),
    "rwkv": ({"context_length": 100}, 100),
    "gpt2": ({"n_positions": 101}, 101),
    "codegen": ({"n_positions": 102}, 102),
    "ctrl": ({"n_positions": 103}, 103),
    "llama": ({"max_position_embeddings": 104}, 104),
    "gpt_neox": ({"max_position_embeddings": 105}, 105),
    "bloom": ({"seq_length": 106}, None),
    "mamba": ({}, None),
    "xlnet": ({}, None),
}


@pytest.mark.parametrize("family", CONTEXTS)
def test_the_context_is_found_wherever_the_config_names_it(family: str, tmp_path: Path) -> None:
    changes, expected = CONTEXTS[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **changes}))
    assert context_length(tmp_path) == expected


@pytest.mark.parametrize("family", ["gemma3", "mpt", "rwkv", "gpt2"])
def test_rows_longer_than_such_a_context_are_refused(family: str, tmp_path: Path) -> None:
    changes, longest = CONTEXTS[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **changes}))
    recipe = load_recipe([DEMO], [f"data.max_tokens={longest}"])
    check_context(recipe, tmp_path)
    with pytest.raises(ConfigError, match=rf"context={longest}.*Set data.max_tokens={longest}"):
        check_context(load_recipe([DEMO], [f"data.max_tokens={longest + 1}"]), tmp_path)


def test_without_a_config_there_is_no_context(tmp_path: Path) -> None:
    assert context_length(tmp_path) is None
