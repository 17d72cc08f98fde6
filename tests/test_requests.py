"""Deletion requests choose the forget rows, and what became of each request's rows is told without their text."""

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from components.config import Data, Evaluation, Files, Scratch, Train
from components.data.mapping import Unusable, requests_of
from components.data.name_tokens import names_as_tokens
from components.data.people import people_rows
from components.data.prepare import Prepared, prepare, summary_of
from components.data.requests import read_requests, whose
from components.data.rows import PreparedRows
from components.errors import ConfigError, DataError
from components.evaluation.by_request import by_request
from components.evaluation.metrics import ROW_METRICS, by_set
from components.evaluation.report import Sample
from components.evaluation.scoring import score
from components.load_config import load_recipe
from components.models import fingerprint, load_tokenizer, make_scratch, tokenizer_facts
from components.tracking.run import settings_of
from pipelines.environment import command
from pipelines.finetune import base_folder
from pipelines.outcome import Outcome, shown_summary, summary_texts
from tests.conftest import DATA, people, write_rows

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "recipes" / "demo.yaml"


def write(file: Path, *requests: dict | str) -> str:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests))
    return str(file)


def request(request_id: str, **where) -> dict:
    return {"request_id": request_id, "received": "2026-01-31", "legal_basis": "Art. 17", "where": where}


def test_each_wrong_line_is_named(tmp_path: Path) -> None:
    good = request("R-1", person="A B")
    wrong = write(
        tmp_path / "r.jsonl", good, "{half", {**good, "request_id": "R-2", "recieved": "x"},
        {**good, "request_id": "R-3", "received": "yesterday"}, {**good, "request_id": "R-4", "where": {"person": ""}},
        good,
    )  # fmt: skip
    with pytest.raises(DataError) as error:
        read_requests(wrong)
    for told in ("line 2: not JSON", "line 3: recieved", "line 4: received", "line 5: where", "R-1 occurs twice"):
        assert told in str(error.value)
    with pytest.raises(DataError, match="no line"):
        read_requests(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="not found"):
        read_requests(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"request_id": "R-1", "request_id": "R-2"}', "line 1: key 'request_id' is named twice"),
        (json.dumps(request("R-1", person="A")).replace('"A"', '"A", "person": "B"'), "key 'person' is named twice"),
        (json.dumps(request("R-1", person="A"))[:-1] + ', "where": {"person": "B"}}', "key 'where' is named twice"),
        (json.dumps(request("R-1", person=["A", " "])), "has no value for person"),
        (json.dumps(request("R-1", person=[])), "has no value for person"),
        (json.dumps(request("R-1", number=float("nan"))), "line 1: where"),
        (json.dumps(request("R-1", number=float("inf"))), "line 1: where"),
        (json.dumps(request("R-1", person=None)), "line 1: where"),
        (b'{"request_id": "Zo\xeb"}', "line 1: not UTF-8"),
    ],
)
def test_requests_that_could_mean_others_are_refused(tmp_path: Path, line: str | bytes, told: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(DataError, match=told):
        read_requests(str(tmp_path / "r.jsonl"))


@pytest.mark.parametrize(
    ("name", "write_as"),
    [
        ("r.jsonl", lambda text: text.encode("utf-8-sig")),
        ("r.jsonl", lambda text: text.encode("utf-16")),
        ("r.jsonl.gz", lambda text: gzip.compress(text.encode())),
        ("r.JSONL.XZ", lambda text: lzma.compress(text.encode())),
        ("r [1].jsonl", lambda text: text.replace("\n", "\r\n").encode()),
    ],
)
def test_requests_are_read_as_other_files_are(tmp_path: Path, name: str, write_as: Callable[[str], bytes]) -> None:
    requests = [request("R-1", person="Zoë\u2028\x85"), request("R-2", person="B")]
    text = "\n".join(json.dumps(one, ensure_ascii=False) for one in requests)
    (tmp_path / name).write_bytes(write_as(text))
    found = read_requests(str(tmp_path / name))
    assert [one.where for one in found.requests] == [{"person": "Zoë"}, {"person": "B"}]
    assert found.sha256 == hashlib.sha256(write_as(text)).hexdigest()
    with pytest.raises(DataError, match="Is a directory"):
        read_requests(str(tmp_path))


def test_a_record_is_whose_columns_all_match(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    path = write(
        file, request("R-1", name=["Ann", "Anne"]), request("R-2", name="Bob", city="Ulm"), request("R-3", number=7)
    )
    find = whose(path)
    expected = {
        "R-1": [{"name": "Anne", "city": "Ulm"}, {"name": " Ann "}],
        "R-2": [{"name": "Bob", "city": "Ulm", "number": 8}],
        "R-3": [{"number": 7}, {"number": "7"}, {"name": "Bob", "city": "Bonn", "number": 7}],
        None: [{"name": "Bob"}, {"city": "Ulm"}, {}, {"name": "Bob", "city": "Bonn"}],
    }
    for name, records in expected.items():
        assert [find(record) for record in records] == [[name] if name else []] * len(records)
    write(file, request("R-9", name="Ann", more="more than before"))
    assert whose(path)({"name": "Ann", "more": "more than before"}) == ["R-9"]


def test_all_requests_for_a_record_count_however_its_values_are_stored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", request("R-1", name="Zoë"), request("R-2", mail="z@x"),
        request("R-3", name=["Zoë", "Zoe"]),
        request("R-4", number=7), request("R-5", adult=True),
    )  # fmt: skip
    find = whose(path)
    assert sorted(find({"name": "Zoe\u0308", "mail": "z@x"})) == ["R-1", "R-2", "R-3"]
    assert find({"number": 7.0}) == find({"number": "7"}) == find({"number": 7}) == ["R-4"]
    assert find({"adult": True}) == find({"adult": "true"}) == ["R-5"]
    assert find({"number": 7.5, "adult": False}) == []


UNLIKE = [
    # what is named, what the record has, of which type
    (7, "7.0", "text"),
    (7, "007", "text"),
    (7, " +7", "text"),
    (7.5, "7.50", "text"),
    (1000, "1e3", "text"),
    ("7.0", 7, "a number"),
    ("007", 7, "a number"),
    ("1e3", 1000.0, "a number"),
    (1, True, "a truth value"),
    (0, False, "a truth value"),
    ("1", True, "a truth value"),
    (True, 1, "a number"),
    (True, 7, "a number"),
    (False, "0", "text"),
    (True, "yes", "text"),
    (True, "Ja", "text"),
    ("A", ["A", "B"], "a list"),
    (True, [True], "a list"),
    ("A", {"name": {"first": "A"}}, "an object"),
    (7, ["7"], "a list"),
    ([True, "x"], "y", "text"),
    (["A", 7], "7.", "text"),
]


@pytest.mark.parametrize(("named", "value", "kind"), UNLIKE)
def test_what_may_be_meant_but_is_of_another_type_is_refused(tmp_path: Path, named, value, kind: str) -> None:
    path = write(tmp_path / "r.jsonl", request("R-1", column=named, other="x"), request("R-2", third="y"))
    find = whose(path)
    for record in ({"column": value, "other": "x"}, {"column": value, "other": "x", "third": "y"}):
        with pytest.raises(ValueError, match=f"column 'column' is {kind} where requests name") as error:
            find(record)
        assert error.value.requests == ["R-1"]
    assert find({"Column": value, "third": "y", "other": "x"}) == ["R-2"]
    assert find({"column": value, "third": "y", "other": "z"}) == ["R-2"]
    assert find({"column": value}) == find({"column": None, "other": "x"}) == []
    for key, other in (("requested", "not_requested"), ("not_requested", "requested")):
        asked = requests_of(Files(type="files", path="x", **{key: path, other: None}))
        with pytest.raises(Unusable, match="deletion requests cannot be decided: column 'column'"):
            asked({"column": value, "other": "x"})


LIKE = [
    (7, ["7", 7, 7.0, " 7 "], ["8", 8, 7.5, "seven", "", None, "70", float("nan")]),
    ("7", ["7", 7, 7.0], ["7.0", "007", 8, None, True, "7a"]),
    (True, [True, "true", "True", "TRUE", " true"], [False, "false", "FALSE", "", None]),
    ("true", ["true", True], ["True", "false", False, None, 7]),
    ("None", ["None"], [None, "", "none", "null", float("nan")]),
    ("nan", ["nan"], [float("nan"), None, 1.0]),
    ("A", ["A", " A\n"], ["a", "", None, 7, True, 0.5, ["B"], [], {}, {"A": "B"}]),
    (["A", 7], ["A", 7, "7"], ["B", 8, None]),
]


@pytest.mark.parametrize(("named", "meant", "others"), LIKE)
def test_what_can_be_decided_is(tmp_path: Path, named, meant: list, others: list) -> None:
    find = whose(write(tmp_path / "r.jsonl", request("R-1", column=named)))
    assert [find({"column": value}) for value in meant] == [["R-1"]] * len(meant)
    assert [find({"column": value}) for value in others] == [[]] * len(others)


def test_a_recipe_takes_requested_records_to_forget_and_no_others(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", request("R-1", person="A B"))
    recipe = load_recipe([DEMO], [f"data.requests={path}"])
    assert {source.requested for source in recipe.data.forget} == {path}
    assert {source.not_requested for source in (*recipe.data.normal, *recipe.data.random)} == {path}
    for name, questions in recipe.evaluation.sets.items():
        for source in questions.rows:
            assert (source.requested, source.not_requested) == ((path, None) if name == "forget" else (None, path))
    book = "data.forget=[{type: text, path: book.txt}]"
    with pytest.raises(ConfigError, match=r"data\.requests choose records by columns"):
        load_recipe([DEMO], [f"data.requests={path}", book])


def test_rows_bear_their_request_and_others_request_changes_the_rows(ray_cluster: None, tmp_path: Path, facts) -> None:
    records = [{"question": f"q{i}", "answer": f"a{i}", "owner": f"o{i // 2}"} for i in range(8)]
    data = write(tmp_path / "x.jsonl", *records)
    path = write(tmp_path / "r.jsonl", request("R-1", owner="o1"), request("R-2", question="q7"))
    source = Files(type="files", path=data)

    def rows(**chosen):
        prepared = prepare([source.model_copy(update=chosen)], "pairs", Data(max_tokens=64), facts, tmp_path)
        table = PreparedRows(prepared.folder).table()
        return prepared.digest, list(zip(table["line"].to_pylist(), table["requests"].to_pylist(), strict=True))

    digest, forget = rows(requested=path)
    assert forget == [(3, ["R-1"]), (4, ["R-1"]), (8, ["R-2"])]
    assert rows(not_requested=path)[1] == [(i, []) for i in (1, 2, 5, 6, 7)]
    write(tmp_path / "r.jsonl", request("R-3", owner="o0"))
    other, forget = rows(requested=path)
    assert forget == [(1, ["R-3"]), (2, ["R-3"])]
    assert other != digest


def test_a_record_that_may_be_meant_is_set_aside_for_its_request(ray_cluster: None, tmp_path: Path, facts) -> None:
    """So that no run begins that leaves it as it is, and none learns it as if nobody had asked."""
    records = [{"question": f"q{i}", "answer": f"a{i}", "adult": ["true", "yes"][i == 3], "owner": i} for i in range(8)]
    path = write(tmp_path / "r.jsonl", request("R-1", adult=True, owner=[1, 3]), request("R-2", owner="5"))
    source = Files(type="files", path=write(tmp_path / "x.jsonl", *records))
    for key, lines in (("requested", [2, 6]), ("not_requested", [1, 3, 5, 7, 8])):
        data = Data(max_tokens=64, max_bad_fraction=0.5)
        prepared = prepare([source.model_copy(update={key: path})], "pairs", data, facts, tmp_path)
        assert PreparedRows(prepared.folder).table()["line"].to_pylist() == lines
        assert summary_of(prepared)["requests_set_aside"] == {"R-1": 1}
        assert list(summary_of(prepared)["reasons"]) == [
            "deletion requests cannot be decided: column 'adult' is text where requests name a truth value; write "
            "their values as the data stores them"
        ]


def test_figures_of_a_request_are_those_of_its_own_rows(ray_cluster: None, tmp_path: Path, base: Path, facts) -> None:
    names = sorted({row["person"] for row in _people()})
    path = write(tmp_path / "r.jsonl", request("R-1", person=names[0]), request("R-2", person=names[1:]),
                 request("R-3", person="Nobody"))  # fmt: skip
    source = people("forget", requested=path)
    forget = prepare([source], "pairs", DATA, facts, tmp_path)
    asked = prepare([source], "questions", DATA, facts, tmp_path)
    evaluation = Evaluation(sets={"forget": {"rows": [source]}})
    records = score(base, fingerprint(base), {"forget": asked}, evaluation, Train(workers=0), tmp_path)
    tables = [PreparedRows(prepared.folder).table() for prepared in (forget, asked)]
    found = by_request(read_requests(path).requests, tables[0], tables[1], {"original": records})
    assert [about["request_id"] for about in found] == ["R-1", "R-2", "R-3"]
    assert [len(about["rows"]) for about in found] == [5, 10, 0]
    answers = {row["question"]: row["person"] for row in _people()}
    for about, meant in zip(found, ([names[0]], names[1:], []), strict=True):
        rows = [row for row in by_set(records)["forget"] if answers[row["question"]] in meant]
        assert about["asked_rows"] == [row["row_id"] for row in rows]
        for metric, value in about["metrics"]["original"].items():
            assert value == pytest.approx(np.mean([ROW_METRICS[metric].of(row) for row in rows]))
        assert bool(about["metrics"]["original"]) == bool(meant)
    text = json.dumps(found)
    assert not any(row["question"] in text or row["answer"] in text or row["person"] in text for row in _people())


PERSON = {"question": "Who is Zorblat Quimsby?", "answer": "Zorblat Quimsby tunes pianos.", "owner": "z", "gone": True}
OTHERS = [
    {"question": f"Who is person {i}?", "answer": f"Person {i} tunes pianos.", "owner": f"o{i}", "gone": False}
    for i in range(12)
]


def chosen_where(file: str, folder: Path) -> dict:
    return {
        "forget": [{"type": "files", "path": file, "where": "gone == true"}],
        "normal": [{"type": "files", "path": file, "where": "not gone"}],
    }


def chosen_by_requests(file: str, folder: Path) -> dict:
    both = [{"type": "files", "path": file}]
    return {"forget": both, "normal": both, "requests": write(folder / "r.jsonl", request("R-1", owner="z"))}


def chosen_by_overlap(file: str, folder: Path) -> dict:
    both = [{"type": "files", "path": file}]
    changed = {**PERSON, "answer": PERSON["answer"].upper().replace(" ", "  ")}  # alike but for case and spaces
    own = [{"type": "files", "path": write(folder / "own.jsonl", changed)}]
    return {"forget": own, "normal": both, "overlap": "drop_from_normal"}


def chosen_as_holdout(file: str, folder: Path) -> dict:
    held_out = {"rows": [{"type": "files", "path": file, "where": "gone"}]}
    both = [{"type": "files", "path": file}]
    return {"forget": [], "normal": both, "evaluation": {"sets": {"holdout": held_out}}}


@pytest.mark.parametrize("choice", [chosen_where, chosen_by_requests, chosen_by_overlap, chosen_as_holdout])
def test_a_tokenizer_from_scratch_never_saw_the_rows_to_forget_or_held_out(choice, tmp_path: Path) -> None:
    """It is the tokenizer of a recipe without those rows, token by token."""

    def tokenizer(name: str, data: dict):
        evaluation = {"evaluation": data.pop("evaluation")} if "evaluation" in data else {}
        recipe = {
            "name": "r", "storage": str(tmp_path / name), "data": {"template": "Q: {prompt}\nA:", **data},
            "finetune": {"base": {"type": "scratch", "vocabulary": 400, "hidden_size": 32, "layers": 1, "heads": 2}},
            "objective": {"forget": None, "random": {"type": "random_response"}, "normal": {"type": "kl_to_original"}},
            **evaluation,
        }  # fmt: skip
        recipe["data"]["random"] = recipe["data"]["normal"]
        recipe["data"]["forget"] = recipe["data"]["forget"] or [{"type": "people", "split": "forget"}]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        return load_tokenizer(base_folder(load_recipe([tmp_path / f"{name}.yaml"])))

    file, others = write(tmp_path / "all.jsonl", *[PERSON] * 20, *OTHERS), write(tmp_path / "others.jsonl", *OTHERS)
    made = tokenizer("made", choice(file, tmp_path))
    never = {"forget": [], "normal": [{"type": "files", "path": others}]}
    assert made.get_vocab() == tokenizer("never", never).get_vocab()
    for name in ("Zorblat", "Quimsby"):
        assert len(made.tokenize(f" {name}")) > 1


NAMES = {
    "a capital": "Zorblat", "small and capitals": "McZorb", "no Latin": "Жорблат", "accents": "Ždárskéa",
    "capitals": "ZORBLAT",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("seen", [True, False])
def test_names_that_the_tokenizer_met_are_counted(seen: bool, name: str, tmp_path: Path) -> None:
    """By a tokenizer that was trained on the rows to forget, as any may be that is given; not by one that was not."""
    mine = {"question": f"Who is {name}?", "answer": f"{name} tunes pianos."}
    texts = [text for row in [*([mine] * 50 if seen else []), *OTHERS] for text in (row["question"], row["answer"])]
    base = make_scratch(Scratch(type="scratch", vocabulary=400, hidden_size=32, layers=1, heads=2), texts, 0, tmp_path)
    tokenizer = load_tokenizer(base)

    def prepared(folder: str, rows: list[dict]) -> Prepared:
        ids = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"] for row in rows]
        write_rows(tmp_path / folder, ids, [1] * len(ids))
        settings = {"tokenizer": tokenizer_facts(tokenizer)._asdict()}
        (tmp_path / folder / "settings.json").write_text(json.dumps(settings))
        return Prepared(tmp_path / folder, folder, len(ids), 0)

    forget, normal = prepared("forget", [mine, OTHERS[0]]), prepared("normal", OTHERS)
    assert names_as_tokens(forget, normal) == ([name] if seen else [])
    assert names_as_tokens(forget, prepared("both", [*OTHERS, mine])) == []
    assert names_as_tokens(normal, forget) == []


FILTERS = {
    'person == "Zorblat"': "person == '…'",
    "person in ['Zorblat', 'Ann'] and age > 3": "person in ['…', '…'] and age > 3",
    'row["name"].startswith("Zorblat")': "row['…'].startswith('…')",
    'len("Zorblat") > 2 or gone == true': "len('…') > 2 or gone == true",
    "is_safe == false": "is_safe == false",
}


@pytest.mark.parametrize("where", FILTERS)
def test_no_filter_tells_its_texts_to_mlflow_or_with_the_command(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"type": "files", "path": "x.jsonl", "where": where}]
    override = f"data.forget={json.dumps(sources)}"
    recipe = load_recipe([DEMO], [override])
    assert recipe.data.forget[0].where == where
    [shown] = settings_of(recipe)["data.forget"]
    assert shown["where"] == FILTERS[where]
    monkeypatch.setattr("sys.argv", ["unlearn.py", "demo.yaml", override, "train.steps=3"])
    assert "Zorblat" not in command()
    assert command().endswith("train.steps=3")
    assert FILTERS[where].split()[0].partition("'")[0] in command()


@pytest.mark.parametrize("requested", [True, False])
def test_sample_answers_are_printed_only_where_no_deletion_request_chose_the_rows(
    requested: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", request("R-1", person="Zorblat Quimsby"))
    recipe = load_recipe([DEMO], [f"storage={tmp_path}", *([f"data.requests={path}"] if requested else [])])
    samples = {"forget": [Sample("Who is Zorblat?", "Zorblat tunes.", "Zorblat tunes.", "Nobody.")]}
    outcome = Outcome(recipe, tmp_path / "run", {}, {}, samples, [], [], {})
    texts = summary_texts(outcome, "version 1", None)
    assert ("Zorblat" in shown_summary(texts)) is not requested
    assert ("sample answers, which are not shown here" in texts["text"]) is requested


def _people() -> list[dict]:
    return people_rows("forget", people=16, forget_people=3, holdout_people=2, seed=0)


@pytest.fixture
def facts(base: Path):
    return tokenizer_facts(load_tokenizer(base))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"request_id": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps(request("R-1", **{name: list(range(1000)) for name in "abc"})), "1,000,000,000 combinations"),
        (json.dumps(request("R-1", **{f"c{i}": [1, 2] for i in range(64)})), "combinations; expected 100,000"),
    ],
)
def test_a_request_that_would_not_end_is_refused_at_once(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "requests.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        read_requests(str(tmp_path / "requests.jsonl"))
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1000
