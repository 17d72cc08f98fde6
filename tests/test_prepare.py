import gzip
import json
import random
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import Data, Files, FixedAnswers, Text
from components.data import prepare as prepare_module
from components.data import tokenise
from components.data.overlap import find_overlap
from components.data.prepare import Prepared, prepare, summary_of
from components.data.prompts import TokenizerFacts
from components.data.rows import PreparedRows
from components.errors import ClusterError, DataError
from components.models import load_tokenizer, tokenizer_facts
from tests.conftest import people

pytestmark = pytest.mark.usefixtures("ray_cluster")
LENIENT = Data(max_bad_fraction=1.0)


@pytest.fixture(scope="session")
def facts(base: Path) -> TokenizerFacts:
    return tokenizer_facts(load_tokenizer(base))


def jsonl(path: Path, lines: list, **mapping: Any) -> Files:
    encoded = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else _json(line) for line in lines
    ]
    path.write_bytes(b"\n".join(encoded))
    return Files(type="files", path=str(path), **mapping)


def _json(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def rows(prepared: Prepared) -> list[dict]:
    return PreparedRows(prepared.folder).table().to_pylist()


def aside(prepared: Prepared) -> list[dict]:
    files = sorted((prepared.folder / "quarantine").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_good_rows_arrive_in_order_and_bad_ones_are_set_aside(tmp_path: Path, base: Path, facts) -> None:
    tokenizer = load_tokenizer(base)
    good = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)]
    bad = ["{broken", {"question": "q"}, {"question": "q", "answer": " "}, {"question": True, "answer": "a"},
           {"question": "q", "answer": "long " * 200}]  # fmt: skip
    source = jsonl(tmp_path / "x.jsonl", [*good[:25], *bad, *good[25:]])
    prepared = prepare([source], "pairs", Data(max_tokens=64, max_bad_fraction=0.2), facts, tmp_path)
    assert (prepared.good, prepared.bad) == (50, 5)
    found = rows(prepared)
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in found]
    assert texts == [f"Question: q{i}\nAnswer: a{i}" for i in range(50)]
    assert [tokenizer.decode(r["input_ids"][r["answer_start"] :]) for r in found[:2]] == [" a0<eos>", " a1<eos>"]
    assert len({row["row_id"] for row in found}) == 50
    left = aside(prepared)
    assert [row["line"] for row in left] == [26, 27, 28, 29, 30]
    assert all(row["file"] == str(tmp_path / "x.jsonl") for row in left)
    reasons = [row["reason"] for row in left]
    assert reasons[0].startswith("not JSON")
    assert reasons[1:] == [
        "no column 'answer' among ['question']", "column 'answer' is empty", "column 'question' is not text",
        "longer than data.max_tokens=64",
    ]  # fmt: skip
    assert left[0]["raw"] == "{broken"
    assert summary_of(prepared)["reasons"]["column 'answer' is empty"] == 1


@pytest.mark.parametrize("where", ["safe == false", "safe != true", "not safe", "safe in [true, null]"])
def test_a_filter_takes_no_row_whose_type_is_not_the_filters(tmp_path: Path, facts, where: str) -> None:
    """Neither false nor true of it: such rows of JSON are set aside, and a CSV file of them is refused at once."""
    values = [False, True, "false", "False", 0, 1, "", False]
    lines = [{"question": f"q{i}", "answer": f"a{i}", "safe": value} for i, value in enumerate(values)]
    source = jsonl(tmp_path / "x.jsonl", lines, where=where)
    prepared = prepare([source], "pairs", Data(max_bad_fraction=0.9), facts, tmp_path)
    assert [row["line"] for row in rows(prepared)] == ([2] if where.startswith("safe in") else [1, 8])
    assert [row["line"] for row in aside(prepared)] == [3, 4, 5, 6, 7]
    assert all(row["reason"].startswith("where cannot be decided: column 'safe' is ") for row in aside(prepared))
    (tmp_path / "x.csv").write_text("question,answer,safe\nq,a,False\n")
    source = Files(type="files", path=str(tmp_path / "x.csv"), where=where)
    with pytest.raises(DataError, match=r"every column is text \(path=.*x\.csv\): column 'safe' is text"):
        prepare([source], "pairs", LENIENT, facts, tmp_path)


DAMAGE = {
    "cut": (lambda row, rng: _json(row).decode()[: rng.randrange(1, 60)].encode(), "not JSON"),
    "bytes": (lambda row, rng: _json(row)[:14] + b"\xff\xfe" + _json(row)[14:], "not UTF-8"),
    "surrogate": (lambda row, rng: json.dumps({**row, "answer": "\ud83d"}).encode(), "not valid Unicode"),
    "missing": (lambda row, rng: _json({"question": row["question"]}), "no column 'answer'"),
    "empty": (lambda row, rng: _json({**row, "question": "\n "}), "column 'question' is empty"),
    "type": (lambda row, rng: _json({**row, "answer": {"text": "x"}}), "column 'answer' is not text"),
    "array": (lambda row, rng: _json(list(row.values())), "not a JSON object"),
    "number": (lambda row, rng: b"17", "not a JSON object"),
    "long": (lambda row, rng: _json({**row, "answer": "word " * 300}), "longer than"),
    "garbage": (lambda row, rng: bytes(rng.choices(b'abc{}[]:,"\\ \t', k=30)) + b"}", "not JSON"),
}


def test_fuzz_every_good_row_arrives_and_every_bad_one_is_set_aside_once(tmp_path: Path, facts) -> None:
    rng = random.Random(0)
    expected_good: Counter = Counter()
    expected_bad: dict[tuple[str, int], str] = {}
    sources = []
    for number in range(4):
        lines: list[bytes] = []
        for i in range(2500):
            row = {"question": f"Where is {number}-{i}?", "answer": f"It is in é漢 {i}.\t{rng.random()}"}
            if rng.random() < 0.25:
                name = rng.choice(sorted(DAMAGE))
                damage, reason = DAMAGE[name]
                expected_bad[str(tmp_path / f"{number}.jsonl"), i + 1] = reason
                lines.append(damage(row, rng))
            else:
                expected_good[f"Question: {row['question']}\nAnswer: {row['answer']}"] += 1
                lines.append(_json(row))
        sources.append(jsonl(tmp_path / f"{number}.jsonl", lines))
    prepared = prepare(sources, "pairs", Data(max_tokens=200, max_bad_fraction=1.0), facts, tmp_path)
    tokenizer = tokenise.Encoder(facts, tokenise.data_settings(LENIENT))
    arrived = Counter(tokenizer.decode(row["input_ids"]).removesuffix("<eos>") for row in rows(prepared))
    assert arrived == expected_good
    left = aside(prepared)
    assert len(left) == len(expected_bad) == prepared.bad
    for row in left:
        reason = expected_bad.pop((row["file"], row["line"]))
        assert reason in row["reason"], row
    assert not expected_bad
    assert sum(summary_of(prepared)["reasons"].values()) == prepared.bad


def test_a_task_that_runs_twice_writes_nothing_twice(tmp_path: Path, facts, monkeypatch) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}, "{broken"])
    original = prepare_module._chunks

    def doubled(files, folder):
        for chunk in original(files, folder):
            [table] = tokenise.read_chunks({key: [files[0][key]] for key in files[0]})
            again = tokenise.tokenise_chunk(table, str(folder)).to_pylist()
            assert again == [chunk]
            yield chunk
            yield again[0]

    monkeypatch.setattr(prepare_module, "_chunks", doubled)
    prepared = prepare([source], "pairs", LENIENT, facts, tmp_path)
    assert (len(rows(prepared)), len(aside(prepared)), prepared.good, prepared.bad) == (1, 1, 1, 1)


def test_text_that_is_not_unicode_or_has_no_prompt_is_set_aside(tmp_path: Path, facts) -> None:
    lines = ['{"question": "cut \\ud83d", "answer": "a"}', {"question": "q", "answer": "a"}]
    prepared = prepare([jsonl(tmp_path / "x.jsonl", lines)], "pairs", LENIENT, facts, tmp_path)
    assert [row["reason"] for row in aside(prepared)] == ["column 'question' is not valid Unicode"]
    assert (prepared.good, prepared.bad) == (1, 1)


def test_a_tokenizers_saved_truncation_is_not_applied(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    clean = tokenizer_facts(tokenizer)
    tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "cut")
    assert tokenizer_facts(load_tokenizer(tmp_path / "cut")) == clean


def test_too_many_bad_rows_stop_with_reasons(tmp_path: Path, facts) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}, {"prompt": "q", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"1 of 2 rows are unusable .*no column 'question' among \['answer', 'prompt'\]"
    ):
        prepare([source], "pairs", Data(), facts, tmp_path)


def test_a_hopeless_set_is_not_read_to_its_end(tmp_path: Path, facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_HOPELESS", 50)
    sources = [jsonl(tmp_path / f"{i}.jsonl", [{"prompt": "q", "answer": "a"}] * 100) for i in range(40)]
    with pytest.raises(DataError, match="rows are unusable"):
        prepare(sources, "pairs", Data(), facts, tmp_path)
    [folder] = (tmp_path / "prepared").iterdir()  # kept to be looked at, not taken for the set
    assert folder.name.endswith(".unusable")
    assert 50 < sum(len(f.read_text().splitlines()) for f in (folder / "quarantine").iterdir()) < 4000


def test_a_filter_that_leaves_out_the_beginning_loses_nothing(tmp_path: Path, facts, monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "_HOPELESS", 50)
    lines = [{"question": f"q{i}", "answer": "a", "keep": False} for i in range(100)]
    sources = [jsonl(tmp_path / f"{i}.jsonl", lines, where="keep") for i in range(10)]
    sources.append(jsonl(tmp_path / "last.jsonl", [{"question": "q", "answer": "a", "keep": True}] * 5, where="keep"))
    assert prepare(sources, "pairs", Data(), facts, tmp_path).good == 5


def test_a_chat_template_that_refuses_the_system_message_is_told_at_once(tmp_path: Path, facts) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"Chat template cannot be used \(data.system=S\).*no system role"):
        prepare([source], "pairs", Data(system="S"), facts._replace(chat_template=template), tmp_path)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops or changes the text of role 'system'"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if x %}{{ y.z }}", "refuses it"),
        (
            "{% for m in messages %}{{ 'B' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
            "{{ 'C' if add_generation_prompt }}",
            "set data.chat_variables so that both agree",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_told_before_reading(tmp_path: Path, facts, template, reason) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=rf"Chat template cannot be used \(data.system=S\): .*{reason}"):
        prepare([source], "pairs", Data(system="S"), facts._replace(chat_template=template), tmp_path)


def test_roles_that_the_template_drops_are_set_aside_and_counted(tmp_path: Path, facts) -> None:
    template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role + ':' + m.content + '<eos>' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    roles = ["user", "developer", "tool", "user", "system"]
    lines = [
        {"question": [{"role": role, "content": "user"}, {"role": "user", "content": "q"}], "answer": f"a{i}"}
        for i, role in enumerate(roles)
    ]
    prepared = prepare(
        [jsonl(tmp_path / "x.jsonl", lines)], "pairs", LENIENT, facts._replace(chat_template=template), tmp_path
    )
    assert [row["line"] for row in rows(prepared)] == [1, 4]
    reasons = [f"chat template drops or changes the text of role {role!r}" for role in ("developer", "tool", "system")]
    assert [row["reason"] for row in aside(prepared)] == reasons
    assert summary_of(prepared)["reasons"] == dict.fromkeys(reasons, 1)


def test_pooled_answers_do_not_depend_on_what_was_asked(tmp_path: Path, base: Path, facts) -> None:
    """Also where the template leaves out the system message once there is an answer, or drops a role."""
    template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{% if m.role == 'user' %}[{% if loop.last and "
        "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}]{% else %}"
        "{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "tool", "content": "t"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "No."}]
    sources = [
        FixedAnswers(type="fixed", texts=["No."]),
        jsonl(tmp_path / "x.jsonl", [{"d": talk}], dialogue="d"),
        jsonl(tmp_path / "y.jsonl", [{"answer": "No."}]),
    ]
    data = Data(system="S")
    prepared = prepare(sources, "answers", data, facts._replace(chat_template=template), tmp_path)
    assert [load_tokenizer(base).decode(row["input_ids"]) for row in rows(prepared)] == ["No.<eos>"] * 3


def test_special_tokens_that_records_hold_are_text_in_every_kind_of_row(tmp_path: Path, base: Path, facts) -> None:
    tokenizer = load_tokenizer(base)
    said = "It ends <eos> here.<pad>"
    source = jsonl(tmp_path / "x.jsonl", [{"question": said, "answer": said, "wrong": [said, "no"]}])
    (tmp_path / "book.txt").write_text(f"{said}\n" * 20)
    book = Text(type="text", path=str(tmp_path / "book.txt"), prefix_tokens=8, continuation_tokens=8)
    data = Data(system=said, answer_prefix=" <eos> ")
    asked = f"{said}\n\nQuestion: {said}\nAnswer:"

    [pair] = rows(prepare([source], "pairs", data, facts, tmp_path))
    assert tokenizer.decode(pair["input_ids"]) == f"{asked} <eos> {said}<eos>"
    assert [pair["input_ids"].count(i) for i in (0, 1)] == [0, 1]
    [fixed] = rows(prepare([FixedAnswers(type="fixed", texts=[said])], "answers", data, facts, tmp_path))
    assert tokenizer.decode(fixed["input_ids"]) == f" <eos> {said}<eos>"
    assert [fixed["input_ids"].count(i) for i in (0, 1)] == [0, 1]
    wrong = source.model_copy(update={"perturbed_answer": "wrong"})
    [question] = rows(prepare([wrong], "questions", data, facts, tmp_path))
    assert [tokenizer.decode(ids) for ids in question["answers"][:2]] == [f" <eos> {said}<eos>"] * 2
    assert [ids.count(1) for ids in question["answers"]] == [1, 1, 1]
    windows = rows(prepare([book], "pairs", data, facts, tmp_path))
    assert tokenizer.decode([i for row in windows[:4] for i in row["input_ids"]]) in f"{said}\n" * 20
    assert not any({0, 1} & set(row["input_ids"]) for row in windows)


def test_numbers_structs_and_messages_come_out_of_parquet(tmp_path: Path, base: Path, facts) -> None:
    tokenizer = load_tokenizer(base)
    message = pa.struct(
        {"role": pa.string(), "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))}
    )
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "q"), ("gpt", "a"))]
    table = pa.table(
        {
            "count": pa.array([7, None, 9]),
            "share": pa.array([0.5, float("nan"), 2.0]),
            "answers": pa.array([{"text": ["x", "y"]}, {"text": ["z"]}, None]),
            "prompt": pa.array([said[:1]] * 3, pa.list_(message)),
            "completion": pa.array([said[1:]] * 3, pa.list_(message)),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")

    def texts(**mapping: Any) -> list[str]:
        source = Files(type="files", path=str(tmp_path / "x.parquet"), **{"prompt": "prompt", **mapping})
        found = rows(prepare([source], "pairs", LENIENT, facts, tmp_path))
        return [tokenizer.decode(row["input_ids"]).removeprefix("Question: q\nAnswer: ") for row in found]

    assert texts(answer="count") == ["7<eos>", "9<eos>"]
    assert texts(answer="share") == ["0.5<eos>", "2.0<eos>"]
    assert texts(answer="answers.text") == ["x<eos>", "y<eos>", "z<eos>"]
    assert texts(answer="completion") == ["a<eos>"] * 3
    assert texts(answer="{count} of {share}") == ["7 of 0.5<eos>", "9 of 2.0<eos>"]


def test_a_book_with_other_line_ends_gives_the_same_rows(tmp_path: Path, facts) -> None:
    text = "Zama went to the town.\n\nIlmarsh lies by the sea.\n" * 50
    found = []
    for number, end in enumerate(("\n", "\r\n", "\r")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(text.replace("\n", end).encode())
        source = Text(type="text", path=str(file), prefix_tokens=8, continuation_tokens=8)
        found.append([row["input_ids"] for row in rows(prepare([source], "pairs", Data(), facts, tmp_path))])
    assert found[0] == found[1] == found[2]


def test_an_empty_file_is_told(tmp_path: Path, facts) -> None:
    with pytest.raises(DataError, match="Data is empty"):
        prepare([jsonl(tmp_path / "x.jsonl", [])], "pairs", Data(), facts, tmp_path)
    source = jsonl(tmp_path / "y.jsonl", [{"question": "q", "answer": "a"}], where="question == 'z'")
    with pytest.raises(DataError, match=r"left out by where=1"):
        prepare([source], "pairs", Data(), facts, tmp_path)


def test_a_file_that_cannot_be_read_is_our_error(tmp_path: Path, facts) -> None:
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"cannot be read \(path=.*x\.parquet"):
        prepare([Files(type="files", path=str(tmp_path / "x.parquet"))], "pairs", Data(), facts, tmp_path)
    assert not list((tmp_path / "prepared").iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "a"}\n' * 10_000)[:-20]),
        ("x.json", b'[{"question": "q", "answer": "a"}, {'),
        ("x.parquet", b"PAR1 and no more"),
        ("x.csv.gz", gzip.compress(b"question,answer\n" + b"q,a\n" * 10_000)[:-20]),
    ],
    ids=["lines", "array", "parquet", "csv"],
)
def test_an_error_of_a_task_is_told_as_it_was_raised(tmp_path: Path, facts, name: str, content: bytes) -> None:
    """One paragraph: without the advice on retries that Ray Data writes into what its tasks raise."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare([Files(type="files", path=str(tmp_path / name))], "pairs", Data(), facts, tmp_path)
    assert "\n" not in str(caught.value)
    assert re.search(r"cannot be read .* Expected a whole \w+ file\.$", str(caught.value))


def test_the_same_rows_are_found_again_and_changed_ones_are_not(tmp_path: Path, facts) -> None:
    source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    first = prepare([source], "pairs", Data(), facts, tmp_path)
    stamp = (first.folder / "summary.json").stat().st_mtime_ns
    assert prepare([source], "pairs", Data(), facts, tmp_path) == first
    assert prepare([source], "pairs", Data(max_bad_fraction=0.5, overlap="keep"), facts, tmp_path) == first
    assert (first.folder / "summary.json").stat().st_mtime_ns == stamp
    others = [
        prepare([source], "pairs", Data(template="{prompt}"), facts, tmp_path),
        prepare([source], "pairs", Data(max_tokens=100), facts, tmp_path),
        prepare([source], "pairs", Data(), facts._replace(eos=0), tmp_path),
        prepare([source], "answers", Data(), facts, tmp_path),
        prepare([source.model_copy(update={"prompt": "{question}?"})], "pairs", Data(), facts, tmp_path),
    ]
    jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "b"}])
    others.append(prepare([source], "pairs", Data(), facts, tmp_path))
    assert len({prepared.digest for prepared in [first, *others]}) == 7
    assert not list((tmp_path / "prepared").glob("*.partial*"))


def test_two_that_prepare_the_same_at_once_do_not_spoil_each_other(tmp_path: Path, facts) -> None:
    lines = [{"question": f"q{i}", "answer": "a"} for i in range(3000)]
    source = jsonl(tmp_path / "x.jsonl", lines)
    done: list[Prepared] = []
    threads = [
        threading.Thread(target=lambda: done.append(prepare([source], "pairs", Data(), facts, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
    assert len(set(done)) == 1
    assert len({row["row_id"] for row in rows(done[0])}) == 3000
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_long_rows_are_set_aside_or_lose_their_end(tmp_path: Path, base: Path, facts) -> None:
    tokenizer = load_tokenizer(base)
    lines = [
        {"question": "q", "answer": "word " * 50},
        {"question": "q " * 50, "answer": "a"},
        {"question": "q", "answer": "a"},
    ]
    source = jsonl(tmp_path / "x.jsonl", lines)
    settings = {"max_tokens": 40, "max_bad_fraction": 1.0}
    kept = prepare([source], "pairs", Data(**settings), facts, tmp_path)
    assert (kept.good, kept.bad) == (1, 2)
    cut = prepare([source], "pairs", Data(**settings, on_long="truncate"), facts, tmp_path)
    assert [row["reason"] for row in aside(cut)] == ["prompt leaves no room for an answer in data.max_tokens=40"]
    first, second = rows(cut)
    assert len(first["input_ids"]) == 40
    assert first["input_ids"][-1] != tokenizer.eos_token_id  # the answer is not over
    assert second["input_ids"][-1] == tokenizer.eos_token_id


def test_filtered_rows_are_counted_and_not_set_aside(tmp_path: Path, facts) -> None:
    lines = [{"question": "q", "answer": f"a{i}", "safe": i % 3 == 0} for i in range(9)]
    prepared = prepare([jsonl(tmp_path / "x.jsonl", lines, where="safe == false")], "pairs", Data(), facts, tmp_path)
    assert (prepared.good, prepared.bad, summary_of(prepared)["filtered"]) == (6, 0, 3)


def test_an_answer_pool_of_fixed_texts(tmp_path: Path, base: Path, facts) -> None:
    source = FixedAnswers(type="fixed", texts=["I do not know.", "No idea."])
    found = rows(prepare([source], "answers", Data(), facts, tmp_path))
    assert [load_tokenizer(base).decode(row["input_ids"]) for row in found] == [
        " I do not know.<eos>",
        " No idea.<eos>",
    ]
    assert [row["answer_start"] for row in found] == [0, 0]


def test_a_book_becomes_windows_that_hold_all_of_it(tmp_path: Path, base: Path, facts) -> None:
    text = "".join(f"Chapter {i}: Zama went to the town of Ilmarsh.\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    source = Text(type="text", path=str(tmp_path / "book.txt"), prefix_tokens=16, continuation_tokens=48)
    prepared = prepare([source], "pairs", Data(), facts, tmp_path)
    tokenizer = load_tokenizer(base)
    found = rows(prepared)
    assert all(len(row["input_ids"]) == 64 and row["answer_start"] == 16 for row in found)
    windows = [tokenizer.decode(row["input_ids"]) for row in found]
    place = 0
    for window in windows:  # each begins where the last one ended, or before
        at = text.find(window, max(0, place - 64 * 12))
        assert 0 <= at <= place
        place = at + len(window)
    assert place == len(text)
    assert prepare([source], "questions", Data(), facts, tmp_path).good == prepared.good


def test_normal_rows_that_stand_in_forget_too(tmp_path: Path, facts) -> None:
    forget = jsonl(tmp_path / "f.jsonl", [{"question": f"q{i}", "answer": "Yes, so it is."} for i in range(5)])
    lines = [{"question": f"n{i}", "answer": "a"} for i in range(20)]
    lines[3] = {"question": "q1", "answer": "Yes, so it is."}
    lines[11] = {"question": " Q2", "answer": "yes,  so it IS."}
    lines[12] = {"question": "q1", "answer": "another answer to the same question"}
    lines[15] = {"question": [{"role": "user", "content": "Q3 "}], "answer": "Yes, SO\nit is."}
    normal = jsonl(tmp_path / "n.jsonl", lines)
    sets = [prepare([source], "pairs", Data(), facts, tmp_path) for source in (forget, normal)]
    with pytest.raises(
        DataError, match=r"3 normal row\(s\) stand in forget too \(exactly: 1, .*line 4; source 1, line 12"
    ):
        find_overlap(*sets, "error", tmp_path)
    overlap = find_overlap(*sets, "drop_from_normal", tmp_path)
    assert overlap is not None
    assert (overlap.exact, overlap.alike) == (1, 2)
    left = PreparedRows(sets[1].folder, overlap.rows)
    every = PreparedRows(sets[1].folder)
    assert len(left) == 17
    expected = [every.row_id(i) for i in range(20) if i not in (3, 11, 15)]
    assert [left.row_id(i) for i in range(17)] == expected
    assert left.table()["row_id"].to_pylist() == expected
    np.testing.assert_array_equal(left.answer(16), every.answer(19))
    assert find_overlap(sets[0], sets[0]._replace(digest="x" * 32), "keep", tmp_path).exact == 5


def test_reading_stops_when_enough_rows_are_there(tmp_path: Path, facts, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.cache: false`: the first rows in the order of the sources, whatever was done first."""
    sources = [
        jsonl(tmp_path / f"{k}.jsonl", [{"question": f"q{k}-{i}", "answer": "a"} for i in range(10)]) for k in range(12)
    ]
    prepared = prepare(sources, "pairs", Data(), facts, tmp_path, need=25)
    every = [row["row_id"] for row in rows(prepare(sources, "pairs", Data(), facts, tmp_path))]
    assert [row["row_id"] for row in rows(prepared)] == every[:30]
    assert len(list((prepared.folder / "rows").iterdir())) == 3

    original = prepare_module._chunks

    def late_first(files, folder):  # the first file's chunk comes last
        chunks = list(original(files, folder))
        yield from sorted(chunks, key=lambda chunk: chunk["name"], reverse=True)

    monkeypatch.setattr(prepare_module, "_chunks", late_first)
    again = prepare(sources, "pairs", Data(), facts, tmp_path / "late", need=25)
    assert [row["row_id"] for row in rows(again)] == every[:30]
    assert again.digest == prepared.digest


def test_rows_are_at_hand_one_by_one(tmp_path: Path, facts, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        jsonl(tmp_path / f"{k}.jsonl", [{"question": f"q{i}", "answer": f"a{k}"} for i in range(k)]) for k in (3, 1, 7)
    ]
    prepared = prepare(sources, "pairs", Data(), facts, tmp_path)
    opened = PreparedRows(prepared.folder)
    table = opened.table().to_pylist()
    assert len(opened) == len(table) == 11
    for i, row in enumerate(table):
        assert [*opened.prompt(i), *opened.answer(i)] == row["input_ids"]
        assert opened.lengths(i) == (row["answer_start"], len(row["input_ids"]) - row["answer_start"])
        assert opened.row_id(i) == row["row_id"]
    assert summary_of(prepared)["longest_prompt"] == max(row["answer_start"] for row in table)


def test_questions_carry_their_candidate_answers(tmp_path: Path, base: Path, facts) -> None:
    tokenizer = load_tokenizer(base)
    source = people("forget", paraphrased_answer="paraphrased_answer", perturbed_answer="perturbed_answer")
    found = rows(prepare([source], "questions", Data(), facts, tmp_path))
    assert len(found) == 15
    for row in found:
        assert len(row["answers"]) == 7
        assert tokenizer.decode(row["answers"][0]) == f" {row['answer']}<eos>"
        assert tokenizer.decode(row["input_ids"]) == f"Question: {row['question']}\nAnswer:"


def test_progress_is_told(tmp_path: Path, facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_TELL_EVERY", 0.0)
    told: list[str] = []
    sources = [jsonl(tmp_path / f"{i}.jsonl", [{"question": f"q{i}", "answer": "a"}] * 10) for i in range(4)]
    prepare(sources, "pairs", Data(), facts, tmp_path, tell=told.append)
    assert len(told) == 4
    assert told[-1].startswith("40 rows ")
    assert told[-1].endswith("100%  left 0s")


def test_a_stall_ends_with_its_cause(tmp_path: Path, facts) -> None:
    import ray

    @ray.remote(num_cpus=4)
    class Greedy:
        def ready(self) -> bool:
            return True

    greedy = Greedy.remote()
    ray.get(greedy.ready.remote())
    context = ray.data.DataContext.get_current()
    before = context.execution_no_progress_timeout_s
    context.execution_no_progress_timeout_s = 5
    try:
        source = jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
        with pytest.raises(ClusterError, match=r"got no further for 5 s \(free CPUs=0 of 4\)"):
            prepare([source], "pairs", Data(), facts, tmp_path)
    finally:
        context.execution_no_progress_timeout_s = before
        ray.kill(greedy)
    assert not list((tmp_path / "prepared").iterdir())


def test_rows_files_are_read_without_decoding(tmp_path: Path, facts) -> None:
    """Uncompressed and of one batch: a row is a view into the file."""
    source = jsonl(tmp_path / "x.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(100)])
    prepared = prepare([source], "pairs", Data(), facts, tmp_path)
    [file] = (prepared.folder / "rows").iterdir()
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(file)) as stream:
        table = pa.ipc.open_file(stream).read_all()
    assert len(table["input_ids"].chunks) == 1
    assert pa.total_allocated_bytes() - before < file.stat().st_size / 4
