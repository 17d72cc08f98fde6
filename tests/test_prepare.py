import json
from pathlib import Path

import pytest

from components.config import Data, Files
from components.data.prepare import prepare, read_rows
from components.errors import DataError
from components.models import load_tokenizer, tokenizer_facts
from tests.conftest import people

pytestmark = pytest.mark.usefixtures("ray_cluster")


def jsonl(path: Path, lines: list) -> Files:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return Files(type="files", path=str(path))


def test_good_rows_arrive_in_order_and_bad_ones_are_set_aside(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    good = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)]
    bad = ["{broken", {"question": "q"}, {"question": "q", "answer": " "}, {"question": 3, "answer": "a"},
           {"question": "q", "answer": "long " * 200}]  # fmt: skip
    source = jsonl(tmp_path / "x.jsonl", [*good[:25], *bad, *good[25:]])
    data = Data(max_tokens=64, max_bad_fraction=0.2)
    prepared = prepare([source], "pairs", data, tokenizer_facts(tokenizer), tmp_path)
    assert (prepared.good, prepared.bad) == (50, 5)
    rows = read_rows(prepared.folder).to_pylist()
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert texts == [f"Question: q{i}\nAnswer: a{i}" for i in range(50)]
    assert [tokenizer.decode(r["input_ids"][r["answer_start"] :]) for r in rows[:2]] == [" a0<eos>", " a1<eos>"]
    assert len({row["row_id"] for row in rows}) == 50
    aside = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == [26, 27, 28, 29, 30]
    assert all(row["file"] == str(tmp_path / "x.jsonl") for row in aside)
    reasons = [row["reason"] for row in aside]
    assert reasons[0].startswith("not JSON")
    assert reasons[1:] == [
        "no column 'answer' among ['question']", "column 'answer' is empty", "column 'question' is not text",
        "longer than data.max_tokens=64",
    ]  # fmt: skip
    assert aside[0]["raw"] == "{broken"


def test_text_that_is_not_unicode_or_has_no_prompt_is_set_aside(tmp_path: Path, base: Path) -> None:
    lines = ['{"question": "cut \\ud83d", "answer": "a"}', {"question": "q", "answer": "a"}]
    data = Data(max_bad_fraction=0.5)
    prepared = prepare(
        [jsonl(tmp_path / "x.jsonl", lines)], "pairs", data, tokenizer_facts(load_tokenizer(base)), tmp_path
    )
    [aside] = (prepared.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(aside)["reason"] == "column 'question' is not valid Unicode"
    assert (prepared.good, prepared.bad) == (1, 1)


def test_a_tokenizers_saved_truncation_is_not_applied(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    clean = tokenizer_facts(tokenizer)
    tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "cut")
    assert tokenizer_facts(load_tokenizer(tmp_path / "cut")) == clean


def test_too_many_bad_rows_stop_with_reasons(tmp_path: Path, base: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}, {"prompt": "q", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"1 of 2 rows are unusable .*no column 'question' among \['answer', 'prompt'\]"
    ):
        prepare([source], "pairs", Data(), tokenizer_facts(load_tokenizer(base)), tmp_path)


def test_an_empty_file_is_told(tmp_path: Path, base: Path) -> None:
    with pytest.raises(DataError, match="Data is empty"):
        prepare([jsonl(tmp_path / "x.jsonl", [])], "pairs", Data(), tokenizer_facts(load_tokenizer(base)), tmp_path)


def test_the_same_rows_are_found_again_and_changed_ones_are_not(tmp_path: Path, base: Path) -> None:
    facts = tokenizer_facts(load_tokenizer(base))
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    first = prepare([source], "pairs", Data(), facts, tmp_path)
    stamp = (first.folder / "summary.json").stat().st_mtime_ns
    assert prepare([source], "pairs", Data(), facts, tmp_path) == first
    assert (first.folder / "summary.json").stat().st_mtime_ns == stamp
    assert prepare([source], "pairs", Data(template="{prompt}"), facts, tmp_path).digest != first.digest
    jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "b"}])
    assert prepare([source], "pairs", Data(), facts, tmp_path).digest != first.digest
    assert not list((tmp_path / "prepared").glob("*.partial*"))


def test_questions_carry_their_candidate_answers(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    source = people("forget", paraphrased_answer="paraphrased_answer", perturbed_answer="perturbed_answer")
    rows = read_rows(prepare([source], "questions", Data(), tokenizer_facts(tokenizer), tmp_path).folder).to_pylist()
    assert len(rows) == 15
    for row in rows:
        assert len(row["answers"]) == 7
        assert tokenizer.decode(row["answers"][0]) == f" {row['answer']}<eos>"
        assert tokenizer.decode(row["input_ids"]) == f"Question: {row['question']}\nAnswer:"
