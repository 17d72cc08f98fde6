import json
from typing import Any

import pytest

from components.config import Files, FixedAnswers, Text
from components.data.mapping import Unusable, examples, parse, raw_text, record_filter, shown
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
    for wrong in ([], ["a", True], False, None, float("nan"), float("inf"), {"text": "a"}, [["a"]], ["a", None]):
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
        ([{"from": "human"}], "not a list of messages"),
        ([{"role": "user", "content": "x"}, {"from": "gpt", "value": ""}], "'value' is empty"),
        ([{"role": "user", "content": [{"type": "image", "text": None}]}], "a part of type 'image'"),
        ([{"role": "user", "content": None}], "'content' is not text"),
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


@pytest.mark.parametrize("empty", ["", " \n", None])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{instruction}\n\n{input}", "Do it."),
        ("{input}\n{instruction}", "Do it."),
        ("{instruction} ({input})", "Do it. ()"),
        ("Task: {instruction}\nInput: {input}", "Task: Do it.\nInput:"),
        ("{instruction}{input}{instruction}", "Do it.Do it."),
    ],
)
def test_a_part_of_a_template_may_be_empty(template: str, text: str, empty: str | None) -> None:
    fields = {"instruction": "Do it.", "input": empty, "answer": "Done."}
    assert examples(fields, source(prompt=template), "pairs") == [(text, ["Done."])]
    for nothing in ({"instruction": " "}, {"instruction": None}):
        with pytest.raises(Unusable, match=r"column 'in.*' is empty and column 'in.*' is empty"):
            examples({**fields, **nothing}, source(prompt=template), "pairs")
    with pytest.raises(Unusable, match="no column 'input' among"):  # a name mistyped is not an empty part
        examples({"instruction": "Do it.", "answer": "Done."}, source(prompt=template), "pairs")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (7, ["7"]),
        (-1.5, ["-1.5"]),
        (0, ["0"]),
        (2**70, [str(2**70)]),
        (1e22, ["1e+22"]),
        ([1, "b", 2.5], ["1", "b", "2.5"]),
    ],
)
def test_numbers_are_text_wherever_text_stands(value: Any, texts: list[str]) -> None:
    fields = {"question": 12, "answer": value, "wrong": value}
    assert examples(fields, source(), "pairs") == [("12", [text]) for text in texts]
    made = examples(fields, source(prompt="{question} + {question}", perturbed_answer="wrong"), "questions")
    assert made == [("12 + 12", [text, *texts]) for text in texts]
    if not isinstance(value, list):
        message = [{"role": "user", "content": value}, {"role": "assistant", "content": value}]
        [(prompt, answers)] = examples({"d": message}, source(dialogue="d"), "pairs")
        assert (prompt[0]["content"], answers) == (texts[0], texts)


def test_options_may_be_numbers_and_their_number_is_no_truth_value() -> None:
    mapped = source(choices="options")
    assert examples({"question": "Q", "options": [3, 4.5], "answer": 1}, mapped, "questions") == [("Q", ["4.5", "3"])]
    with pytest.raises(Unusable, match="is not the number of one of 2 options"):
        examples({"question": "Q", "options": [3, 4], "answer": True}, mapped, "questions")


ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
TALK = [("system", "S"), ("human", "U"), ("gpt", "A"), ("tool", "T"), ("user", "V"), ("chatgpt", "B")]


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None} for text in texts]


@pytest.mark.parametrize("last", sorted(role for role, known in ROLES.items() if known == "assistant"))
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("content", [str, parts, lambda text: parts(text[:1], text[1:])])
def test_dialogues_of_other_forms_are_the_same_messages(last: str, keys: tuple[str, str], content: Any) -> None:
    said = [{keys[0]: role, keys[1]: content(f"{text} é"), "weight": 1} for role, text in [*TALK, (last, "End")]]
    expected = [{"role": ROLES[role], "content": f"{text} é"} for role, text in TALK]
    [made] = examples({"conversations": said}, source(dialogue="conversations"), "pairs")
    assert made == (expected, ["End é"])
    completed = {"prompt": said[:-1], "completion": said[-1:]}
    assert examples(completed, source(prompt="prompt", answer="completion"), "pairs") == [made]


@pytest.mark.parametrize("blank", ["", "  ", None, parts("")])
def test_an_empty_system_message_is_kept_as_one(blank: Any) -> None:
    said = [{"from": "system", "value": blank}, {"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]
    [(prompt, answers)] = examples({"d": said}, source(dialogue="d"), "pairs")
    assert prompt == [{"role": "system", "content": ""}, {"role": "user", "content": "U"}]
    assert (answers, shown(prompt)) == (["A"], "U")
    with pytest.raises(Unusable, match="is empty"):
        examples({"d": [*said[:1], {"from": "human", "value": " "}, said[2]]}, source(dialogue="d"), "pairs")


def test_a_completion_may_have_several_turns() -> None:
    user, bot = ({"role": role, "content": role} for role in ("user", "assistant"))
    mapped = source(prompt="prompt", answer="completion")
    expected = [([user, bot, user], ["assistant"])]
    assert examples({"prompt": [user], "completion": [bot, user, bot]}, mapped, "pairs") == expected
    assert examples({"prompt": "user", "completion": [bot, user, bot]}, mapped, "pairs") == expected
    assert examples({"prompt": "user", "completion": [bot]}, mapped, "pairs") == [("user", ["assistant"])]
    others = source(prompt="prompt", answer="completion", paraphrased_answer="chosen", perturbed_answer="rejected")
    fields = {"prompt": [user], "completion": [bot], "chosen": [bot], "rejected": [bot]}
    assert examples(fields, others, "questions") == [([user], ["assistant"] * 3)]
    for whole in ([user, bot], [bot, user], [user]):
        with pytest.raises(Unusable, match="name a whole conversation as dialogue"):
            examples({"prompt": "user", "completion": whole}, mapped, "pairs")


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),  # a list in a struct
        ([{"text": "a", "answer_start": 1}, {"text": "b", "answer_start": 2}], ["a", "b"]),  # structs in a list
        ({"text": "a"}, ["a"]),
        ({"text": 3}, ["3"]),
    ],
)
def test_a_dotted_name_reaches_into_structs(answers: Any, texts: list[str]) -> None:
    fields = {"data": {"question": {"stem": "Q"}}, "answers": answers}
    mapped = source(prompt="data.question.stem", answer="answers.text")
    for kind in ("pairs", "questions"):
        assert examples(fields, mapped, kind) == [("Q", [text]) for text in texts]
    assert (
        examples(fields, mapped.model_copy(update={"prompt": "It: {data.question.stem}"}), "pairs")[0].prompt == "It: Q"
    )
    assert examples({**fields, "answers.text": "own"}, mapped, "pairs") == [("Q", ["own"])]  # a column of that name
    for wrong, reason in (
        ({}, "no column"),
        ([], "not a list of texts"),
        (None, "not text"),
        ({"text": []}, "not a list"),
    ):
        with pytest.raises(Unusable, match=reason):
            examples({**fields, "answers": wrong}, mapped, "pairs")


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_a_books_line_ends_are_one_character(end: str) -> None:
    [example] = examples({"text": f"One{end}{end}two{end}"}, Text(type="text", path="x"), "pairs")
    assert example.answers == ["One\n\ntwo\n"]
