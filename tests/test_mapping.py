import json
from typing import Any

import pytest

from components.config import Files, FixedAnswers, Text
from components.data.mapping import Unusable, examples, parse, raw_text, record_filter
from components.data.sources import Record


def source(**mapping: Any) -> Files:
    return Files(type="files", path="x.jsonl", **mapping)


def test_templates_put_columns_together() -> None:
    fields = {"knowledge": "K", "question": "Q {x}", "Right Answer": "A"}
    [example] = examples(fields, source(prompt="{knowledge}\n{question}", answer="{Right Answer}!"), "pairs")
    assert example == ("K\nQ {x}", ["A!"])
    with pytest.raises(Unusable, match="no column 'nothing' among"):
        examples(fields, source(prompt="{nothing}"), "pairs")


def test_several_answers_make_a_row_each() -> None:
    fields = {"question": "Q", "answer": "one; two ;; three"}
    assert [e.answers for e in examples(fields, source(split_answers=";"), "pairs")] == [["one"], ["two"], ["three"]]
    assert [e.answers for e in examples(fields | {"answer": ["a", "b"]}, source(), "answers")] == [["a"], ["b"]]
    for wrong in ([], ["a", 3], 3, None):
        with pytest.raises(Unusable, match="'answer' is not"):
            examples(fields | {"answer": wrong}, source(), "pairs")
    with pytest.raises(Unusable, match="holds no answer"):
        examples(fields | {"answer": " ; "}, source(split_answers=";"), "pairs")
    with pytest.raises(Unusable, match="'answer' is empty"):
        examples(fields | {"answer": ["a", " "]}, source(), "pairs")


def test_dialogues_end_with_the_answer() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant: Like this:\n\n1. so"
    [(prompt, [answer])] = examples({"rejected": text}, source(dialogue="rejected"), "pairs")
    assert answer == "Like this:\n\n1. so"
    assert [(m["role"], m["content"]) for m in prompt] == [("user", "Hi"), ("assistant", "Hello."), ("user", "How?")]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    [(prompt, [answer])] = examples({"rejected": messages}, source(dialogue="rejected"), "pairs")
    assert (prompt, answer) == (messages[:2], "A")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no turns", "does not begin with a turn"),
        ("before \n\nHuman: x", "does not begin with a turn"),
        ("\n\nHuman: x\n\nAssistant: y\n\nHuman: z", "does not end with an answer"),
        ("\n\nAssistant: y", "does not end with an answer"),
        ("\n\nHuman: x\n\nAssistant: ", "is empty"),
        ("\n\nHuman: \n\nAssistant: y", "turn 1' is empty"),
        ([{"role": None, "content": "x"}], "'role' is not text"),
        ([], "not a list of messages"),
        ([{"role": "user"}], "not a list of messages"),
    ],
)
def test_broken_dialogues_say_what_is_wrong(text: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        examples({"d": text}, source(dialogue="d"), "pairs")


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("is_safe == false", True),
        ("not is_safe and severity > 1", True),
        ("severity >= 3 or lang in ['en', 'de']", True),
        ('row["a name"] == "x"', True),
        ("lower(lang) == 'EN'", False),
        ("len(lang) == 2 and extra == null", True),
    ],
)
def test_filters_are_expressions_of_the_columns(where: str, holds: bool) -> None:
    fields = {"is_safe": False, "severity": 2, "lang": "en", "a name": "x", "extra": None}
    assert record_filter(source(where=where))(fields) is holds


@pytest.mark.parametrize("where", ["missing == 1", "lang > 3", "lang == true", "not lang", "lang in [1, 2]"])
def test_filters_that_cannot_be_decided_set_the_row_aside(where: str) -> None:
    with pytest.raises(Unusable, match="where cannot be decided"):
        record_filter(source(where=where))({"lang": "en"})


@pytest.mark.parametrize("where", ["__import__('os')", "lang.__class__", "9**9**9", "row.clear()", "lang.zfill(9)"])
def test_filters_that_run_code_are_refused_with_the_recipe(where: str) -> None:
    with pytest.raises(ValueError, match="which filters do not allow"):
        source(where=where)


def test_a_question_has_its_right_answer_first() -> None:
    fields = {"question": "Q", "answer": "A", "p": "A'", "w": ["X", "Y"]}
    [example] = examples(fields, source(paraphrased_answer="p", perturbed_answer="w"), "questions")
    assert example == ("Q", ["A", "A'", "X", "Y"])


def test_fixed_answers_and_text_need_no_columns() -> None:
    assert examples({"text": "No."}, FixedAnswers(type="fixed", texts=["No."]), "answers") == [("", ["No."])]
    assert examples({"text": "Once"}, Text(type="text", path="x"), "pairs") == [("", ["Once"])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'"text"', "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "x", "a": "y"}', "key 'a' is named twice"),
        (b'{"a": "x", "b": {"c": 1, "d": 2, "c": 1}}', "key 'c' is named twice"),
        (b'{"a": [{"role": "user", "content": "x", "role": "system"}]}', "key 'role' is named twice"),
        (b'{"a": 1, "\\u0061": 2}', "key 'a' is named twice"),
        (b'\xef\xbb\xbf{"": 1, "": 1}', "key '' is named twice"),
    ],
)
def test_lines_that_are_no_records_say_why(line: bytes, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse(Record(1, line))
    assert raw_text(Record(1, b"a\xff")) == "a\\xff"
    assert json.dumps(raw_text(Record(1, line)))
