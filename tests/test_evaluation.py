import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import hmean
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from components.config import Data, Evaluation, Train
from components.data.prepare import Prepared, prepare
from components.data.rows import PreparedRows
from components.errors import DataError
from components.evaluation import evaluate, scoring
from components.evaluation import metrics as rows_
from components.evaluation.evaluate import (
    better,
    compared,
    evaluate_records,
    forget_quality,
    harmonic_mean,
    reference_of,
)
from components.evaluation.exchange import open_unlearning_log, read_reference
from components.evaluation.membership import ATTACKS, auc, min_k_plus_plus, privleak
from components.evaluation.metrics import (
    ROW_METRICS,
    log_truth_ratio,
    log_truth_ratio_arithmetic,
    normalised_probability,
    probability,
    rouge_recall,
)
from components.evaluation.report import arrow, metrics_table, telling_samples, write_model_card, write_report
from components.evaluation.scoring import Asked, Scorer, score
from components.evaluation.shared_prompt import may_share, parts, side_by_side, worth_sharing
from components.models import fingerprint, load_model, load_tokenizer, tokenizer_facts
from tests.conftest import people

ROW = {"logp": [[math.log(0.5), math.log(0.5)], [math.log(0.25)], [math.log(0.1)], [math.log(0.4)] * 3],
       "paraphrased": True, "answer": "the red fox", "generated": "a red fox jumps", "set": "forget",
       "mean": [-1.0, -2.0], "variance": [4.0, 0.0], "hit": [True, False]}  # fmt: skip


def test_row_metrics_in_closed_form() -> None:
    assert probability(ROW) == pytest.approx(0.5)
    assert normalised_probability(ROW) == pytest.approx(0.5 / (0.5 + 0.1 + 0.4))
    assert math.exp(log_truth_ratio(ROW)) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.25)
    assert math.exp(log_truth_ratio_arithmetic(ROW)) == pytest.approx((0.1 + 0.4) / 2 / 0.25)
    without = {**ROW, "paraphrased": False, "logp": [ROW["logp"][0], *ROW["logp"][2:]]}
    assert math.exp(log_truth_ratio(without)) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5)
    assert rows_.truth_ratio_score(ROW) == pytest.approx(0.2 / 0.25)
    assert rows_.truth_ratio_score({**ROW, "set": "retain"}) == pytest.approx(1 - 0.2 / 0.25)
    assert rouge_recall(ROW) == pytest.approx(2 / 3)
    assert rouge_recall({"answer": "runs", "generated": "running"}) == 1.0  # stemmed
    assert rows_.longest_run(ROW) == pytest.approx(2 / 3)
    assert rows_.longest_run({"answer": "a b c d", "generated": "x a b a b c"}) == 0.75
    assert rows_.unique_words({"generated": "a b a b"}) == 0.5
    assert rows_.unique_words({"generated": ""}) == rows_.bleu({"answer": "a", "generated": ""}) == 0
    same = "one two three four five"
    assert rows_.bleu({"answer": same, "generated": same}) == pytest.approx(1)
    assert rows_.leak({"answer": same, "generated": same}) == 1
    assert rows_.leak({"answer": same, "generated": "nothing like it"}) == 0
    assert rows_.choice(ROW) == 1
    assert rows_.choice({**ROW, "logp": [[math.log(0.1)], [0.0], [math.log(0.2)]]}) == 0
    assert rows_.worst_sample({"answer": "the red fox", "sampled": ["a dog", "the red cat"]}) == pytest.approx(2 / 3)
    assert rows_.similarity({"generated": "a b c d", "original_generated": "a b"}) == pytest.approx(2 / 3)
    assert rows_.similarity({"generated": "", "original_generated": ""}) == 1
    assert rows_.refusal({"generated": "I’m sorry, but no."}) == 1
    assert rows_.refusal({"generated": "Paris."}) == 0


@pytest.mark.parametrize(
    ("hits", "memorized", "strength"),
    [  # the last one is the EOS's, which is not counted
        ([True, True, True, False], 1.0, 1.0),
        ([False, True, True, False], 2 / 3, 2 / 3),
        ([True, True, False, True], 2 / 3, 0.0),
        ([False, False, False, True], 0.0, 0.0),
        ([True], 1.0, 1.0),
        ([False], 0.0, 0.0),
    ],
)
def test_memorisation_counts_tokens(hits: list[bool], memorized: float, strength: float) -> None:
    assert rows_.exact_memorization({"hit": hits}) == pytest.approx(memorized)
    assert rows_.extraction_strength({"hit": hits}) == pytest.approx(strength)


def test_attacks_in_closed_form() -> None:
    row = {**ROW, "logp": [[-1.0, -5.0, -2.0, -9.0]], "mean": [-2.0] * 4, "variance": [1.0, 9.0, 4.0, 1.0]}
    assert ATTACKS["loss"].of(row) == pytest.approx(17 / 4)
    assert ATTACKS["zlib"].of(row) == pytest.approx(17 / 4 / len(zlib.compress(b"the red fox")))
    assert ATTACKS["reference"].of({**row, "reference_loss": 4.0}) == pytest.approx(1 / 4)
    assert ATTACKS["min_k"].of(row) == pytest.approx(5)  # 40 % of three tokens is one
    assert min_k_plus_plus(row) == pytest.approx(1)  # (-5 + 2) / 3
    assert auc([1, 2, 2], [2, 3]) == pytest.approx(roc_auc([1, 2, 2], [2, 3])) == pytest.approx(5 / 6)
    assert privleak(0.9, 0.5) == pytest.approx(-80)
    assert privleak(0.5, 0.5) == 0


def roc_auc(members: list[float], others: list[float]) -> float:
    pairs = [(a, b) for a in members for b in others]
    return sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def test_forget_quality_is_the_ks_test() -> None:
    assert forget_quality([1, 2, 3, 4], [1, 2, 3, 4]) == (1, 0)
    assert forget_quality([0.1] * 10, [0.9] * 10)[0] == pytest.approx(2 / math.comb(20, 10))
    tiny, log = forget_quality([0.1] * 3000, [0.9] * 3000)
    assert tiny < 1e-300
    assert log == pytest.approx(math.log10(2) - 3000 / math.log(10))


def test_model_utility_is_the_harmonic_mean_and_zero_when_any_part_is() -> None:
    parts = np.array([0.2, 0.5, 0.8, 0.9, 1.0])
    assert harmonic_mean(parts) == pytest.approx(hmean(parts))
    assert harmonic_mean(np.array([0.2, 0.0])) == 0


def test_every_metric_says_which_way_is_good() -> None:
    assert better("forget_probability") == better("forget_extraction_strength") == "lower"
    assert better("retain_probability") == better("forget_truth_ratio") == better("forget_quality") == "higher"
    assert better("forget_unique_words") == "higher"
    for metric, about in ROW_METRICS.items():
        turned = {"higher": "lower", "lower": "higher"}[about.better]
        assert better(f"forget_{metric}") == (about.better if about.always else turned), metric
        assert better(f"retain_{metric}") == about.better
    assert arrow("lm_eval_wikitext_bits_per_byte") == ""
    assert better("mia_min_k") == "0.5"
    assert better("privleak") == "0"
    assert all(metric.meaning for metric in ROW_METRICS.values())


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    mapping = {"paraphrased_answer": "paraphrased_answer", "perturbed_answer": "perturbed_answer"}
    return Evaluation(
        sets={
            "forget": {"rows": [people("forget", **mapping)]},
            "retain": {"rows": [people("normal", limit=20, **mapping)]},
            "general": {"rows": [people("general", limit=10, **mapping)], "normalised": True},
            "holdout": {"rows": [people("holdout", **mapping)]},
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


def test_scores_equal_a_plain_forward_of_each_pair(records: pa.Table, questions: Any, base: Path) -> None:
    """Right, paraphrased and wrong answers alike: sharing a row with others changes nothing."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).double(), load_tokenizer(base)
    assert records.num_rows == 15 + 20 + 10 + 10
    asked = [row for p in questions.values() for row in PreparedRows(p.folder).table().to_pylist()]
    for row, source in list(zip(records.to_pylist(), asked, strict=True))[::6]:
        head = source["input_ids"]
        assert head == tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        assert source["answers"][0] == [*tokenizer(f" {row['answer']}").input_ids, tokenizer.eos_token_id]
        assert len(row["logp"]) == len(source["answers"]) > 3
        for found, tail in reversed(list(zip(row["logp"], source["answers"], strict=True))):
            with torch.no_grad():
                logp = torch.log_softmax(model(torch.tensor([head + tail])).logits[0], -1)
            said = logp[len(head) - 1 : len(head) - 1 + len(tail)]
            assert found == pytest.approx([said[i, token].item() for i, token in enumerate(tail)], abs=1e-4)
        assert row["hit"] == [said[i].argmax().item() == token for i, token in enumerate(tail)]
        mean = (said.exp() * said).sum(-1)
        assert row["mean"] == pytest.approx(mean.tolist(), abs=1e-4)
        assert row["variance"] == pytest.approx(((said.exp() * said**2).sum(-1) - mean**2).tolist(), abs=1e-3)
        greedy = model.generate(torch.tensor([head]), max_new_tokens=12, do_sample=False)[0, len(head) :]
        assert row["generated"] == tokenizer.decode(greedy, skip_special_tokens=True).strip()


def test_a_row_of_several_answers() -> None:
    row = side_by_side([5, 6], [[7, 8, 9], [4]])
    assert row.ids == [5, 6, 7, 8]
    assert row.positions == [0, 1, 2, 3]
    assert row.branch == [0, 0, 1, 1]
    assert row.places == [[1, 2, 3], [1]]
    long, single = side_by_side([1] * 3000, [[2] * 500, [3]]), side_by_side([5], [[6, 7]])
    assert [len(part) for part in parts([row, row, long, long, row, single, single], 9)] == [2, 2, 1, 2]
    assert [len(part) for part in parts([row] * 7, 3)] == [3, 3, 1]


def test_prompts_are_shared_where_that_costs_less() -> None:
    long_prompt, long_answers = side_by_side([1] * 200, [[2] * 5] * 7), side_by_side([1] * 20, [[2] * 150] * 7)
    assert worth_sharing(long_prompt, 32)
    assert not worth_sharing(long_answers, 32)
    assert worth_sharing(long_answers, 4096)


def test_rows_beyond_a_models_window_are_not_shared() -> None:
    config = MistralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, vocab_size=32, sliding_window=6)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    assert may_share(model, side_by_side([5, 6], [[7, 8, 9], [4, 5, 6]]))
    assert not may_share(model, side_by_side([5, 6, 7], [[7, 8, 9], [4, 5, 6]]))


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("qwen2_moe", {"sliding_window": 6, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": False}, None),
        ("mistral", {"sliding_window": 0}, None),
        ("mistral", {"sliding_window": None}, None),
        ("phi3", {"sliding_window": -1}, None),
        ("mistral", {"sliding_window": 6}, 6),
        ("gpt_neo", {"window_size": 6}, 6),
        ("recurrent_gemma", {"attention_window_size": 6}, 6),
        ("llama4_text", {"attention_chunk_size": 6}, 6),
    ],
)
def test_a_window_is_one_only_where_it_is_positive(family: str, changes: dict[str, Any], window: int | None) -> None:
    model = SimpleNamespace(config=CONFIG_MAPPING[family](**changes))
    assert may_share(model, side_by_side([5, 6], [[7, 8, 9], [4, 5, 6]]))
    assert may_share(model, side_by_side([5] * 300, [[7, 8, 9], [4, 5, 6]])) == (window is None)


def test_a_model_that_cannot_share_is_asked_answer_by_answer(
    records: pa.Table, questions: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared prompts give the same; and so does a model that takes no mask of this form, found out by trying."""
    rows = PreparedRows(questions["forget"].folder).table().slice(0, 4)
    monkeypatch.setattr(scoring, "worth_sharing", lambda row, hidden_size: True)
    scorer = Scorer(str(base), "fp32", Asked(0, 0, 1.0, False))
    same(scorer(rows), records)
    assert scorer.shares_prompts
    forward, seen = type(scorer.model.base_model).forward, []

    def without_mask(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(scorer.model.base_model), "forward", without_mask)
    other = Scorer(str(base), "fp32", Asked(0, 0, 1.0, False))
    same(other(rows.slice(0, 1)), records)
    assert other.shares_prompts is False
    seen.clear()
    same(other(rows.slice(1)), records.slice(1))
    assert [shape[0] for shape in seen] == [3] * 7  # 3 prompts with 7 answers each, 3 at a time


def same(found: pa.Table, expected: pa.Table) -> None:
    for row, other in zip(found.to_pylist(), expected.to_pylist(), strict=False):
        assert row["generated"] is None
        for ours, theirs in zip(row["logp"], other["logp"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        assert row["hit"] == other["hit"]


def test_gradient_norms_are_those_of_plain_autograd(questions: Any, base: Path) -> None:
    rows = PreparedRows(questions["forget"].folder).table().slice(0, 2)
    found = Scorer(str(base), "fp32", Asked(0, 0, 1.0, True))(rows)["gradient_norm"].to_pylist()
    model = load_model(base)
    for row, norm in zip(rows.to_pylist(), found, strict=True):
        prompt, answer = row["input_ids"], row["answers"][0]
        model.zero_grad()
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        expected = np.mean([float(p.grad.norm()) for p in model.parameters()])
        assert norm == pytest.approx(expected, rel=1e-4)


def test_drawn_answers_repeat_and_differ(questions: Any, base: Path) -> None:
    rows = PreparedRows(questions["forget"].folder).table().slice(0, 3)
    drawn = [Scorer(str(base), "fp32", Asked(6, 4, 1.0, False))(rows)["sampled"].to_pylist() for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert [len(texts) for texts in drawn[0]] == [4, 4, 4]
    assert len({text for texts in drawn[0] for text in texts}) > 6


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
    found = evaluate_records(records, reference_of(records), evaluation)
    metrics = found.values
    assert metrics["forget_quality"] == 1
    nine = [metrics[f"{s}_{m}"] for s in ("retain", "general") for m in ("probability", "rouge", "truth_ratio")]
    assert metrics["model_utility"] == (pytest.approx(hmean(nine)) if min(nine) > 0 else 0)
    assert metrics["privleak"] == pytest.approx(0, abs=1e-9)
    optional = {"mia_reference", "mia_gradient_norm", "harmful", "worst_sample", "similarity"}
    assert set(found.missing) == optional  # each says what it needs
    assert all(why.startswith("needs ") for why in found.missing.values())
    for name, (low, high) in found.intervals.items():
        assert low <= metrics[name] <= high, name
    alone = evaluate_records(records, None, evaluation)
    assert "forget_quality" not in alone.values
    assert alone.missing["forget_quality"].startswith("needs a retain-only model")
    assert set(alone.missing) == {"forget_quality", "forget_quality_log10", "privleak", *optional}


def test_only_what_is_asked_for(base: Path, questions: Any, evaluation: Evaluation, tmp_path: Path) -> None:
    """Without a metric that reads answers none are generated; what is named and cannot be had is said."""
    asked = ["*_probability", "forget_perplexity", "mia_reference", "nonsense"]
    quick = evaluation.model_copy(update={"metrics": asked})
    table = score(base, fingerprint(base), questions, quick, Train(workers=0), tmp_path)
    assert table["generated"].null_count == table.num_rows
    found = evaluate_records(table, None, quick)
    names = {"forget", "retain", "general", "holdout"}
    assert set(found.values) == {*(f"{name}_probability" for name in names), "forget_perplexity"}
    assert found.missing == {"mia_reference": "needs evaluation.reference", "nonsense": "names no metric of these sets"}
    rows = [row["logp"][0] for row in table.to_pylist() if row["set"] == "forget"]
    tokens = [value for logp in rows for value in logp]
    assert found.values["forget_perplexity"] == pytest.approx(math.exp(-np.mean(tokens)))


def test_a_difference_is_judged_on_the_same_rows(records: pa.Table, evaluation: Evaluation) -> None:
    """A model a little worse on every row: the interval of the difference leaves out 0, those of the two overlap."""
    worse = [{**row, "logp": [[x - 0.01 for x in logp] for logp in row["logp"]]} for row in records.to_pylist()]
    table = pa.Table.from_pylist(worse, schema=records.schema)
    one, other = (evaluate_records(t, reference_of(records), evaluation) for t in (table, records))
    difference, low, high = compared(one, other)["retain_probability"]
    assert difference == pytest.approx(one.values["retain_probability"] - other.values["retain_probability"])
    assert low <= difference <= high < 0
    assert one.intervals["retain_probability"][1] > other.intervals["retain_probability"][0]
    assert compared(one, one)["model_utility"] == (0, 0, 0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Means of 60 numbers drawn from a known distribution: 95 % of the intervals hold its mean, give or take."""
    rng = np.random.default_rng(0)
    draws = evaluate._resamples(60, "any")
    held = 0
    for _ in range(200):
        numbers = rng.exponential(size=60)
        low, high = evaluate._interval(numbers[draws].mean(axis=1))
        held += low <= 1 <= high
    assert 178 <= held <= 198


def test_records_of_other_questions_are_refused(records: pa.Table, evaluation: Evaluation) -> None:
    other = records.filter(pa.compute.not_equal(records["row_id"], records["row_id"][0]))
    with pytest.raises(DataError, match="other forget questions"):
        evaluate_records(records, reference_of(other), evaluation)


def test_published_logs_are_read_and_ours_is_one(records: pa.Table, evaluation: Evaluation, tmp_path: Path) -> None:
    """Our own open-unlearning log read back gives the numbers of the records; TOFU's losses give the same ratios."""
    rows = [row for row in records.to_pylist() if row["set"] == "forget"]
    found = evaluate_records(records, reference_of(records), evaluation)
    log, summary = open_unlearning_log(found, records.to_pylist())
    assert summary["forget_Q_A_Prob"] == found.values["forget_probability"]
    assert summary["forget_truth_ratio"] == pytest.approx(found.values["forget_truth_ratio"])
    few = evaluation.model_copy(update={"metrics": ["forget_quality"]})
    assert "forget_truth_ratio" in open_unlearning_log(evaluate_records(records, None, few), records.to_pylist())[1]
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(log))
    theirs = read_reference(tmp_path / "TOFU_EVAL.json")
    assert theirs.log_truth_ratios == pytest.approx([log_truth_ratio(row) for row in rows])
    assert evaluate_records(records, theirs, evaluation).values["forget_quality"] == pytest.approx(1)
    assert evaluate_records(records, theirs, evaluation).values["privleak"] == pytest.approx(0, abs=1e-9)
    losses = {
        "avg_paraphrased_loss": {str(i): -float(np.mean(row["logp"][1])) for i, row in enumerate(rows)},
        "average_perturb_loss": {
            str(i): [-float(np.mean(logp)) for logp in rows_.wrong_logp(row)] for i, row in enumerate(rows)
        },
    }
    (tmp_path / "tofu.json").write_text(json.dumps({"eval_log_forget.json": losses}))
    assert read_reference(tmp_path / "tofu.json").log_truth_ratios == pytest.approx(theirs.log_truth_ratios)
    losses["average_perturb_loss"].pop("14")
    losses["avg_paraphrased_loss"].pop("14")
    (tmp_path / "tofu.json").write_text(json.dumps({"eval_log_forget.json": losses}))
    with pytest.raises(DataError, match=r"here=15 rows, there=14"):
        evaluate_records(records, read_reference(tmp_path / "tofu.json"), evaluation)
    for content in ("{}", "no json", '{"forget_truth_ratio": 3}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match="Log of the retain-only model"):
            read_reference(tmp_path / "bad.json")


def test_samples_are_the_ones_that_tell(records: pa.Table) -> None:
    rows = [{**row} for row in records.to_pylist()]
    changed = [row for row in rows if row["set"] == "forget"]
    changed[4]["logp"] = [[-50.0], *changed[4]["logp"][1:]]
    changed[7]["logp"] = [[-0.001], *changed[7]["logp"][1:]]
    shown = telling_samples(records, pa.Table.from_pylist(rows, schema=records.schema), "forget")
    assert [shown[0].question, shown[-1].question] == [changed[4]["question"], changed[7]["question"]]
    kept = [row for row in rows if row["set"] == "retain"]
    kept[2]["logp"] = [[-50.0], *kept[2]["logp"][1:]]
    shown = telling_samples(records, pa.Table.from_pylist(rows, schema=records.schema), "retain")
    assert shown[0].question == kept[2]["question"]


def test_report_and_card_are_whole(records: pa.Table, evaluation: Evaluation, tmp_path: Path) -> None:
    found = evaluate_records(records, reference_of(records), evaluation)
    models = {"original": found, "unlearned": found, "retain-only": found._replace(missing={"x": "needs <y>"})}
    tables = dict.fromkeys(models, records)
    lines = [{"step": i, "train/forget_loss": -i, "train/grad_norm": 1.0, "train/clip_fraction": 0.5} for i in range(3)]
    lines.append({"step": 3, "train/bad_steps": 1.0})  # a step that was left out
    shown = {"forget": telling_samples(records, records, "forget")}
    gates = [["m", "1", ">=", "0", "pass"]]
    write_report(tmp_path / "r.html", "a <run>", {"command": "x"}, models, tables, lines, shown, gates, "gates <hold>")
    page = (tmp_path / "r.html").read_text()
    assert "a &lt;run&gt;" in page
    assert "gates &lt;hold&gt;" in page
    assert page.count("data:image/png;base64,") == 1 + 2 + 3
    assert "http" not in page.replace('http-equiv="', "")  # nothing is fetched from outside
    assert shown["forget"][0].question in page
    assert "needs &lt;y&gt;" in page
    values = {name: evaluated.values for name, evaluated in models.items()}
    write_model_card(tmp_path / "README.md", "run", {"command": "x"}, values)
    assert "| model_utility |" in (tmp_path / "README.md").read_text()
    assert all(len(line) <= 100 for line in metrics_table(values).splitlines())
    assert "forget_probability ↓" in metrics_table(values)
