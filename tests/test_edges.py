"""Every metric at the edges of float: probabilities of 0 and 1, ties, what is too small for a float, empty answers."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config import Evaluation
from components.evaluation.evaluate import Reference, evaluate_records, forget_quality, harmonic_mean, reference_of
from components.evaluation.membership import ATTACKS, auc
from components.evaluation.metrics import ROW_METRICS, normalised_probability, probability
from components.evaluation.report import metrics_table
from components.evaluation.scoring import token_statistics
from components.evidence import attainable

EDGES = [0.0, -0.0, -5e-324, -1e-9, -math.log(2), -87.4, -700.0, -745.2, -1e4, -3.4e38, -math.inf]
LOGP = st.lists(st.sampled_from(EDGES) | st.floats(-800, 0), min_size=1, max_size=4)
TEXT = st.sampled_from(["", " ", "a", "A b c", "?!", "the fox", "\u200d", "的", "a " * 40])


@st.composite
def rows(draw: Any, set_name: str = "forget") -> dict[str, Any]:
    answers = draw(st.lists(LOGP, min_size=3, max_size=5))
    own = answers[0]
    return {
        "set": set_name, "row_id": "0", "question": "q", "paraphrased": draw(st.booleans()), "logp": answers,
        "answer": draw(TEXT.filter(str.strip)), "generated": draw(TEXT), "original_generated": draw(TEXT),
        "sampled": [draw(TEXT)], "harmful": draw(st.booleans()), "hit": [draw(st.booleans()) for _ in own],
        "mean": [-1.0 for _ in own], "variance": [draw(st.sampled_from([0.0, 1e-40, 1.0])) for _ in own],
        "reference_loss": draw(st.sampled_from([0.0, 1e30, 3.0])), "gradient_norm": 0.0,
    }  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(rows() | rows("retain"))
def test_every_row_metric_is_a_number_within_its_range(row: dict[str, Any]) -> None:
    for name, about in ROW_METRICS.items():
        low, high = attainable(f"{row['set']}_{name}")
        assert low <= about.of(row) <= high, name
    assert 0 <= normalised_probability(row) <= 1
    for name, attack in ATTACKS.items():
        assert not math.isnan(attack.of(row)), name


@settings(max_examples=20, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5), st.lists(rows("holdout"), min_size=1, max_size=5))
def test_every_metric_of_a_model_is_finite_or_missing_with_a_reason(forget: Any, holdout: Any) -> None:
    records = pa.Table.from_pylist([*forget, *holdout])
    found = evaluate_records(records, reference_of(records), evaluation("forget", "holdout", utility=["holdout"]))
    assert all(math.isfinite(value) for value in found.values.values())
    assert {"forget_probability", "forget_perplexity", "mia_loss", "model_utility"} <= {*found.values}
    for name, value in found.values.items():
        low, high = attainable(name)
        assert low <= value <= high, name
    assert ("forget_quality" in found.values) == (len(forget) >= 4)
    json.dumps([found.values, found.intervals], allow_nan=False)


def evaluation(*sets: str, utility: list[str]) -> Evaluation:
    asked = {name: {"rows": [{"type": "people", "split": "forget"}]} for name in sets}
    return Evaluation.model_validate({"sets": asked, "utility": utility})


def row(*answers: list[float], set_name: str = "forget", row_id: str = "0") -> dict[str, Any]:
    return {
        "set": set_name, "row_id": row_id, "question": "q", "paraphrased": False, "logp": list(answers), "answer": "a",
        "generated": "b", "original_generated": "b", "hit": [True] * len(answers[0]), "mean": [-1.0] * len(answers[0]),
        "variance": [1.0] * len(answers[0]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        (-800.0, [-800.0], 0.5),  # both e^-800, which no float holds
        (-800.0, [-801.0], 1 / (1 + math.exp(-1))),
        (-1e6, [-2.0], 0.0),
        (-2.0, [-1e6, -math.inf], 1.0),
        (-math.inf, [-math.inf, -math.inf], 1 / 3),
        (0.0, [-math.log(4)], 0.8),
    ],
)
def test_normalised_probability_where_floats_end(right: float, wrong: list[float], expected: float) -> None:
    given_ = row([right], *([w] for w in wrong))
    assert normalised_probability(given_) == pytest.approx(expected, rel=1e-12)
    assert probability(given_) == pytest.approx(math.exp(max(right, -1e30)))


@pytest.mark.parametrize("bad", [[math.nan], [-1.0, math.nan], [math.nan, -math.inf]])
def test_a_set_answered_with_no_numbers_is_missing_and_the_others_are_measured(bad: list[float]) -> None:
    sound = [row([-1.0], [-2.0], set_name="retain", row_id=str(i)) for i in range(4)]
    records = pa.Table.from_pylist([row([-1.0], [-2.0]), row(bad, [-2.0], row_id="1"), *sound])
    found = evaluate_records(records, None, evaluation("forget", "retain", utility=["forget", "retain"]))
    assert found.values["retain_probability"] == pytest.approx(math.exp(-1))
    unmeasured = {"forget_probability", "forget_truth_ratio", "forget_perplexity", "forget_quality", "model_utility"}
    assert not unmeasured & {*found.values}
    assert {found.missing[name] for name in unmeasured} == {
        "the model's log-probabilities are no numbers in 1 of 2 rows"
    }
    assert "retain_probability" in metrics_table({"m": found.values}, everything=True)


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (2, 1 / 3), (3, 0.1)])
def test_forget_quality_of_too_few_rows_is_missing(count: int, least: float) -> None:
    """The p-value of samples wholly apart is 2/C(2n, n): below four rows the test could not tell any models apart."""
    assert forget_quality(range(count), range(10, 10 + count))[0] == pytest.approx(least)
    records = pa.Table.from_pylist([row([-1.0], [-2.0], row_id=str(i)) for i in range(count)])
    reference = Reference([5.0 + i for i in range(count)], None)
    found = evaluate_records(records, reference, evaluation("forget", utility=[]))
    assert "forget_quality" not in found.values
    assert f"is at least {least:.2g}" in found.missing["forget_quality"]
    more = pa.Table.from_pylist([row([-1.0], [-2.0], row_id=str(i)) for i in range(4)])
    quality = evaluate_records(more, Reference([5.0, 6, 7, 8], None), evaluation("forget", utility=[]))
    assert quality.values["forget_quality"] == pytest.approx(2 / math.comb(8, 4))


@pytest.mark.parametrize("least", [-math.inf, -3e38, -1e30, -1e4])
def test_tokens_of_probability_0_add_nothing_to_mean_and_variance(least: float) -> None:
    """As those of a padded vocabulary: the statistics are those of the vocabulary without them."""
    logits, tokens = torch.randn(5, 7), torch.tensor([0, 6, 3, 2, 1])
    padded = torch.cat([logits, torch.full((5, 3), least)], dim=1)
    for found, expected in zip(token_statistics(padded, tokens), token_statistics(logits, tokens), strict=True):
        torch.testing.assert_close(found, expected)
    certain = torch.full((1, 4), least).index_fill(1, torch.tensor([2]), 0.0)
    logp, mean, variance, hit = token_statistics(certain, torch.tensor([2]))
    assert (logp.item(), mean.item(), variance.item(), hit.item()) == (0.0, 0.0, 0.0, True)
    assert token_statistics(certain, torch.tensor([1]))[0].item() == pytest.approx(least)


def test_means_of_nothing_and_of_everything() -> None:
    assert harmonic_mean(np.array([[1e-320, 1.0], [1.0, 0.0]])).tolist() == pytest.approx([0, 0])
    assert auc([math.inf, math.inf], [math.inf]) == 0.5
    assert auc([-math.inf, 0.0], [math.inf]) == 1.0


def test_the_range_of_every_metric_is_known() -> None:
    assert all(attainable(f"some_set_{name}") == (0, 1) for name in ROW_METRICS)
    assert attainable("relearn 20%, 5 steps/forget_rouge") == (0, 1)
    assert attainable("lm_eval_arc_easy_probability") == (-math.inf, math.inf)
