import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from scipy.stats import hmean

from components.config import Data, Evaluation, Train
from components.data.prepare import Prepared, prepare
from components.evaluation.metrics import (
    evaluate_records,
    forget_quality,
    log_truth_ratio,
    model_utility,
    normalised_probability,
    probability,
    rouge_recall,
)
from components.evaluation.report import first_samples, metrics_table, write_model_card, write_report
from components.evaluation.scoring import score
from components.models import fingerprint, load_tokenizer, tokenizer_facts
from tests.conftest import people

ROW = {"logp": [[math.log(0.5), math.log(0.5)], [math.log(0.25)], [math.log(0.1)], [math.log(0.4)] * 3],
       "paraphrased": True, "answer": "the red fox", "generated": "a red fox jumps"}  # fmt: skip


def test_row_metrics_in_closed_form() -> None:
    assert probability(ROW) == pytest.approx(0.5)
    assert normalised_probability(ROW) == pytest.approx(0.5 / (0.5 + 0.1 + 0.4))
    assert math.exp(log_truth_ratio(ROW)) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.25)
    without = {**ROW, "paraphrased": False, "logp": [ROW["logp"][0], *ROW["logp"][2:]]}
    assert math.exp(log_truth_ratio(without)) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5)
    assert rouge_recall("the red fox", "a red fox jumps") == pytest.approx(2 / 3)
    assert rouge_recall("runs", "running") == 1.0  # stemmed


def test_forget_quality_is_the_ks_test() -> None:
    assert forget_quality([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert forget_quality([0.1] * 10, [0.9] * 10) == pytest.approx(2 / math.comb(20, 10))


def test_model_utility_is_the_harmonic_mean_and_zero_when_any_part_is() -> None:
    parts = {"a_probability": 0.2, "a_rouge": 0.5, "a_truth_ratio": 0.8, "b_probability": 0.9, "b_rouge": 1.0}
    assert model_utility(parts, ["a", "b"]) == pytest.approx(hmean(list(parts.values())))
    assert model_utility({**parts, "a_rouge": 0.0}, ["a", "b"]) == 0


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    mapping = {"paraphrased_answer": "paraphrased_answer", "perturbed_answer": "perturbed_answer"}
    return Evaluation(
        sets={
            "forget": {"rows": [people("forget", **mapping)]},
            "retain": {"rows": [people("normal", limit=20, **mapping)]},
            "general": {"rows": [people("general", limit=10, **mapping)], "normalised": True},
        },
        utility=["retain", "general"],
        max_new_tokens=12,
        batch_size=7,
    )


@pytest.fixture(scope="session")
def questions(ray_cluster: None, base: Path, storage: Path, evaluation: Evaluation) -> dict[str, Prepared]:
    facts = tokenizer_facts(load_tokenizer(base))
    return {name: prepare(s.rows, "questions", Data(), facts, storage) for name, s in evaluation.sets.items()}


@pytest.fixture(scope="session")
def records(base: Path, questions: dict[str, Prepared], evaluation: Evaluation, storage: Path) -> pa.Table:
    return score(base, fingerprint(base), questions, evaluation, Train(workers=0), storage)


def test_scores_equal_a_plain_forward_of_each_pair(records: pa.Table, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).double(), load_tokenizer(base)
    assert records.num_rows == 15 + 20 + 10
    for row in records.to_pylist()[::6]:
        head = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        tail = [*tokenizer(f" {row['answer']}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([head + tail])).logits[0], -1)
        expected = [logp[len(head) - 1 + i, token].item() for i, token in enumerate(tail)]
        assert row["logp"][0] == pytest.approx(expected, abs=1e-4)
        greedy = model.generate(torch.tensor([head]), max_new_tokens=12, do_sample=False)[0, len(head) :]
        assert row["generated"] == tokenizer.decode(greedy, skip_special_tokens=True).strip()


def test_workers_give_the_same_records(records, base: Path, questions, evaluation: Evaluation, tmp_path: Path) -> None:
    train = Train(workers=2, cpus_per_worker=0.5)
    other = score(base, fingerprint(base), questions, evaluation, train, tmp_path)
    for a, b in zip(records.to_pylist(), other.to_pylist(), strict=True):
        assert a["row_id"] == b["row_id"]
        assert a["generated"] == b["generated"]
        for x, y in zip(a["logp"], b["logp"], strict=True):
            assert x == pytest.approx(y, abs=1e-5)


def test_records_are_found_again(records, base: Path, questions, evaluation: Evaluation, storage: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (storage / "evaluations").rglob("*.parquet")}
    again = score(base, fingerprint(base), questions, evaluation, Train(workers=0), storage)
    assert again.equals(records)
    assert {file: file.stat().st_mtime_ns for file in (storage / "evaluations").rglob("*.parquet")} == before


def test_metrics_of_a_model_against_itself(records: pa.Table, evaluation: Evaluation) -> None:
    metrics = evaluate_records(records, records, evaluation)
    assert metrics["forget_quality"] == 1
    nine = [metrics[f"{s}_{m}"] for s in ("retain", "general") for m in ("probability", "rouge", "truth_ratio")]
    assert metrics["model_utility"] == (pytest.approx(hmean(nine)) if min(nine) > 0 else 0)
    assert "forget_quality" not in evaluate_records(records, None, evaluation)


def test_report_and_card_are_whole(records: pa.Table, evaluation: Evaluation, tmp_path: Path) -> None:
    metrics = evaluate_records(records, records, evaluation)
    models = {"original": metrics, "unlearned": metrics}
    lines = [{"step": i, "train/forget_loss": -i, "train/grad_norm": 1.0, "train/clip_fraction": 0.5} for i in range(3)]
    shown = {"forget": first_samples(records, records, "forget")}
    write_report(
        tmp_path / "r.html", "a <run>", {"command": "x"}, models, lines, shown, [["m", "1", ">=", "0", "pass"]]
    )
    page = (tmp_path / "r.html").read_text()
    assert "a &lt;run&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace('http-equiv="', "")  # nothing is fetched from outside
    assert shown["forget"][0].question in page
    write_model_card(tmp_path / "README.md", "run", {"command": "x"}, models)
    assert "| model_utility |" in (tmp_path / "README.md").read_text()
    assert all(len(line) <= 100 for line in metrics_table(models).splitlines())
