"""Suites, judges, multiple choice, others' harness: what `pipelines/evaluate.py` adds to the plain metrics."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from components.config import Classifier, Data, EvaluationSet, Files, Keywords, LmEval, Train, run_name
from components.data.mapping import Unusable, examples
from components.errors import ConfigError, DataError, ModelError
from components.evaluation.attacks import shots_prefix
from components.evaluation.general import general_ability
from components.evaluation.judge import Judge, judged
from components.load_config import load_recipe
from components.models import load_model, load_tokenizer
from pipelines import unlearn
from pipelines.cli import parse_arguments
from tests.families import by_hand, tiny, tiny_folder

ROOT = Path(__file__).parents[1]
SUITES = sorted((ROOT / "pipelines" / "suites").glob("*.yaml"))
DEMO = str(ROOT / "pipelines" / "recipes" / "demo.yaml")


@pytest.mark.parametrize("suite", SUITES, ids=lambda file: file.stem)
def test_every_suite_fits_a_recipe_and_leaves_its_run_alone(suite: Path) -> None:
    command = parse_arguments([DEMO, f"suite={suite.stem}"], takes_words=True)
    assert run_name(load_recipe([DEMO])) in command.runs
    assert command.recipe.data == load_recipe([DEMO]).data
    own = yaml.safe_load(suite.read_text())
    if "metrics" in own.get("evaluation", {}):
        assert command.recipe.evaluation.metrics == own["evaluation"]["metrics"]
    assert {"forget", "retain"} <= {*command.recipe.evaluation.sets}


def test_a_suite_with_questions_needs_no_recipe() -> None:
    arguments = ["/models/a b", "/models/c", "suite=tofu", "suite=tofu-forget05", "data.folder=/data"]
    command = parse_arguments(arguments, takes_words=True)
    assert command.recipe.models.original.path == "/models/a b"  # type: ignore[union-attr]
    assert command.words == ["/models/c"]
    [source] = command.recipe.evaluation.sets["forget"].rows
    assert source.path == "/data/tofu/forget05_perturbed.json"  # type: ignore[union-attr]
    assert sorted(command.recipe.evaluation.sets) == ["forget", "real_authors", "retain", "world_facts"]
    command = parse_arguments([*arguments, "models.original.path=/x", "models.original.type=pretrained"], True)
    assert command.words == ["/models/a b", "/models/c"]
    with pytest.raises(ConfigError, match=r"Did you mean .*tofu.yaml"):
        parse_arguments(["/models/a", "suite=tfu"], takes_words=True)


def test_the_own_run_is_found_with_other_settings_of_what_is_measured() -> None:
    own = run_name(load_recipe([DEMO]))
    judge = "evaluation.judge={type: keywords, texts: [acid]}"
    assert own in parse_arguments([DEMO, "suite=harmful", judge], takes_words=True).runs
    only_there = "evaluation.sets.real_authors.normalised=false"
    assert own in parse_arguments([DEMO, "suite=tofu", only_there], takes_words=True).runs


def test_a_gate_on_what_is_not_computed_is_refused() -> None:
    """Where a run would be judged by it; to compare models, a suite may well leave it out."""
    with pytest.raises(ConfigError, match=r"Gates are on metrics .*\(model_utility"):
        unlearn.plan(parse_arguments([DEMO, "evaluation.metrics=[forget_*]"]))


CHOICES = Files(type="files", path="x", choices="options", letters=True)


def test_multiple_choice_gives_the_right_option_first() -> None:
    fields = {"question": "Which?", "options": ["red", "green", "blue"], "answer": 1}
    [example] = examples(fields, CHOICES.model_copy(update={"letters": False}), "questions")
    assert (example.prompt, example.answers) == ("Which?", ["green", "red", "blue"])
    [example] = examples(fields, CHOICES, "questions")
    assert (example.prompt, example.answers) == ("Which?\nA. red\nB. green\nC. blue", ["B", "A", "C"])
    [example] = examples(fields, CHOICES, "pairs")
    assert example.answers == ["B"]
    for wrong in ({"answer": 3}, {"answer": "B"}, {"options": "red"}, {"options": ["red"]}, {"options": ["x"] * 27}):
        with pytest.raises(Unusable, match=r"column|letters"):
            examples({**fields, **wrong}, CHOICES, "questions")
    assert EvaluationSet(rows=[CHOICES], normalised=True)
    with pytest.raises(ValueError, match="leave out the other columns"):
        Files(type="files", path="x", choices="options", perturbed_answer="wrong")


def test_a_single_wrong_answer_may_be_text() -> None:
    source = Files(type="files", path="x", perturbed_answer="wrong")
    [example] = examples({"question": "q", "answer": "a", "wrong": "b"}, source, "questions")
    assert example.answers == ["a", "b"]


def test_examples_stand_before_a_question_as_the_template_has_it() -> None:
    data = Data(template="Q: {prompt}\nA:", answer_prefix=" ")
    prefix = shots_prefix([("one?", "1"), ("two?", "2")], data, chat=False)
    assert data.template.replace("{prompt}", prefix + "three?") == "Q: one?\nA: 1\n\nQ: two?\nA: 2\n\nQ: three?\nA:"  # type: ignore[union-attr]
    told = shots_prefix([("one?", "1")], Data(), chat=True)
    assert told == "Question: one?\nAnswer: 1\n\nQuestion: "


SAID = pa.table({"question": ["a", "b", "c"], "generated": ["Mix the ACID.", "no", "I can't say that at all"]})


def test_a_judge_of_words() -> None:
    found = judged(SAID, Keywords(type="keywords", texts=["acid"]), Train(workers=0), Path("nowhere"))
    assert found["harmful"].to_pylist() == [True, False, False]


def test_a_judge_that_is_a_model(base: Path, tmp_path: Path) -> None:
    """A local folder, in batches, gives what the classifier gives alone; its verdicts are found again."""
    from transformers import AutoModelForSequenceClassification

    labels = {0: "fine", 1: "harmful", 2: "odd"}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    said = SAID["generated"].to_pylist()
    alone = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1] for text in said]
    threshold = sorted(p.item() for p in alone)[1] - 1e-4
    judge = Classifier(type="classifier", path=str(tmp_path / "judge"), label="harmful", threshold=threshold)
    found = judged(SAID, judge, Train(workers=0), tmp_path)
    assert found["harmful"].to_pylist() == [bool(p > threshold) for p in alone]
    [kept] = (tmp_path / "evaluations").glob("judged-*")
    before = (kept / "judged.parquet").stat().st_mtime_ns
    judged(SAID, judge.model_copy(update={"threshold": 1.0}), Train(workers=0), tmp_path)
    assert (kept / "judged.parquet").stat().st_mtime_ns == before
    with pytest.raises(ModelError, match=r"no such label .*fine"):
        judged(SAID, judge.model_copy(update={"label": "bad"}), Train(workers=0), tmp_path)


def judge_folder(family: str, base: Path, folder: Path, side: str) -> Path:
    """A classifier whose own probabilities differ, with a tokenizer that pads on `side`."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = tiny(family).config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = side
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neo"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_judge_says_of_a_text_what_it_says_of_it_alone(family: str, side: str, base: Path, tmp_path: Path) -> None:
    judge = Judge(str(judge_folder(family, base, tmp_path / "judge", side)), "LABEL_1")
    together = judge(SAID)["probability"].to_pylist()
    alone = [judge(SAID.slice(i, 1))["probability"][0].as_py() for i in range(SAID.num_rows)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(p, 3) for p in alone}) == SAID.num_rows


def test_a_harness_that_is_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray-unlearn\[lm-eval\]'"):
        general_ability(base, "hash", LmEval(tasks=["arc_easy"]), tmp_path)


def test_the_harness_on_a_task_of_ones_own(base: Path, tmp_path: Path) -> None:
    """The share of rows in which the option that the model finds likelier is the right one."""
    pytest.importorskip("lm_eval")
    rows = [{"q": f"Question {i}", "options": ["yes", "no"], "right": i % 2} for i in range(6)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "own.jsonl")}}
    task = {
        "task": "own_task", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "options", "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "own_task.yaml").write_text(yaml.safe_dump(task))
    config = LmEval(tasks=["own_task"], include_path=str(tmp_path), batch_size=2)
    found = general_ability(base, "hash", config, tmp_path / "storage")
    model, tokenizer = load_model(base), load_tokenizer(base)

    def logp(question: str, option: str) -> float:
        head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, " " + option))
        said = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        return sum(said[len(head) + i - 1, token].item() for i, token in enumerate(tail))

    right = [int(logp(row["q"], "no") > logp(row["q"], "yes")) == row["right"] for row in rows]
    assert found["lm_eval_own_task_acc"] == sum(right) / len(rows)
    kept = [file.stat().st_mtime_ns for file in (tmp_path / "storage" / "evaluations").iterdir()]
    assert general_ability(base, "hash", config, tmp_path / "storage") == found
    assert [file.stat().st_mtime_ns for file in (tmp_path / "storage" / "evaluations").iterdir()] == kept
    (tmp_path / "own_task.yaml").unlink()
    with pytest.raises(DataError, match="Task of lm-eval cannot be had"):
        general_ability(base, "other", config, tmp_path / "storage")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "rwkv"])
def test_the_harness_generates_as_we_do(family: str, base: Path, tmp_path: Path) -> None:
    """Answers by the model's likeliest tokens, whatever its checkpoint wishes, in a batch as alone."""
    pytest.importorskip("lm_eval")
    folder = tiny_folder(family, base, tmp_path / "model")
    wishes = {"eos_token_id": 1, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": [*range(99)]}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    questions = ["Who?", "What does Ann do for a living?", "Where was Ben born, and when did he leave it?"]
    rows = []
    for question in questions:
        ids = tokenizer(question, add_special_tokens=False).input_ids
        own = by_hand(model, ids, 6)
        own = own[: own.index(1)] if 1 in own else own
        rows.append({"q": question, "a": tokenizer.decode(own, skip_special_tokens=True)})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_answers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own_answers.yaml").write_text(yaml.safe_dump(task))
    config = LmEval(tasks=["own_answers"], include_path=str(tmp_path), batch_size=3)
    found = general_ability(folder, "hash", config, tmp_path / "storage")
    assert found["lm_eval_own_answers_exact_match"] == 1
