import numpy as np
import pytest
from pydantic import ValidationError

from components.config import Gate
from components.evidence import Evaluated, Evidence, read_evidence, write_evidence
from components.tracking.gates import gate_table, judge

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 0.1, 1000)


def evidence(**models: dict[str, float]) -> Evidence:
    """Of models by name; every metric's resampled numbers are its value and the same noise."""
    evaluated = {
        name.replace("_", "-"): Evaluated(values, {}, {"gone": "needs x"}, {m: v + NOISE for m, v in values.items()})
        for name, values in models.items()
    }
    return Evidence({"forget": "f1"}, {name: f"hash of {name}" for name in evaluated}, evaluated)


OURS = "hash of unlearned"


def verdicts(gates: list[Gate], found: Evidence, champion: Evidence | None = None) -> list[bool]:
    """Of the gates given; the last result, whether the model answers as the original does, has tests of its own."""
    results = judge(gates, {None: found}, OURS, None if champion is None else {None: champion})
    return [r.passed for r in results[:-1]]


def test_each_bound_holds_up_to_its_edge() -> None:
    found = evidence(unlearned={"a": 0.5}, original={"a": 1.0}, retain_only={"a": 0.25})
    holds = [
        Gate(metric="a", min=0.5),
        Gate(metric="a", max=0.5),
        Gate(metric="a", min_ratio=0.5, of="original"),
        Gate(metric="a", max_drop=0.5, of="original"),
        Gate(metric="a", max_rise=0.25, of="retain-only"),
        Gate(metric="a", max_distance=0.25, of="retain-only"),
        Gate(metric="a", max_distance=0.5, of="original"),
    ]
    assert verdicts(holds, found) == [True] * 7
    tighter = [
        gate.model_copy(update={kind: limit + (0.01 if kind in ("min", "min_ratio") else -0.01)})
        for gate in holds
        for kind, limit in [gate.bound]
    ]
    results = judge(tighter, {None: found}, OURS)[:-1]
    assert [r.passed for r in results] == [False] * 7
    assert [r.margin for r in results] == pytest.approx([-0.01] * 7)


def test_confidence_asks_the_worse_end_of_the_interval() -> None:
    found = evidence(unlearned={"a": 0.5}, original={"a": 0.55})
    low, high = np.percentile(NOISE, [2.5, 97.5])
    assert verdicts([Gate(metric="a", min=0.4), Gate(metric="a", min=0.4, confident=True)], found) == [True, False]
    assert verdicts([Gate(metric="a", max=0.6, confident=True)], found) == [False]
    bound = Gate(metric="a", min=0.25, confident=True), Gate(metric="a", max=0.75, confident=True)
    assert [r.margin for r in judge(bound, {None: found}, OURS)[:-1]] == pytest.approx([0.25 + low, 0.25 - high])
    # On the same rows the noise of both models is the same, so that the difference is certain.
    assert verdicts([Gate(metric="a", max_drop=0.06, of="original", confident=True)], found) == [True]
    assert verdicts([Gate(metric="a", max_drop=0.04, of="original", confident=True)], found) == [False]
    bare = found._replace(evaluated={n: e._replace(resampled={}) for n, e in found.evaluated.items()})
    assert judge([Gate(metric="a", min=0, confident=True)], {None: bare}, OURS)[0].why == "no interval"


def test_what_is_missing_or_of_something_else_fails() -> None:
    found = evidence(unlearned={"a": 0.5}, original={"b": 1.0})
    gates = [
        Gate(metric="gone", min=0),
        Gate(metric="never", min=0),
        Gate(metric="a", min=0, suite="attacks"),
        Gate(metric="a", min_ratio=0.1, of="original"),
        Gate(metric="a", max_distance=9, of="retain-only"),
    ]
    results = judge(gates, {None: found}, OURS)[:-1]
    assert not any(result.passed for result in results)
    assert [result.why for result in results] == [
        "needs x", "not measured", "no evaluation by attacks", "not measured of original",
        "not measured of retain-only",
    ]  # fmt: skip
    text = gate_table(results)
    assert text.count("FAIL, inconclusive: ") == 5
    assert text.count("not computed") == 3
    assert judge(gates[:1], {None: found}, "another")[0].why == "evaluation is of another model"
    assert judge(gates[:1], {}, OURS)[0].why == "no evaluation"


def test_the_champion_is_compared_on_the_same_questions_only() -> None:
    gate = Gate(metric="a", max_drop=0.1, of="champion")
    found = evidence(unlearned={"a": 0.5})
    assert judge([gate], {None: found}, OURS)[0] == (
        "a", ">= champion - 0.1", 0.5, None, None, True, "no champion yet"
    )  # fmt: skip
    assert verdicts([gate], found, evidence(unlearned={"a": 0.59})) == [True]
    assert verdicts([gate], found, evidence(unlearned={"a": 0.61})) == [False]
    other = evidence(unlearned={"a": 0.1})._replace(questions={"forget": "f2"})
    assert judge([gate], {None: found}, OURS, {None: other})[0].why == "the champion was asked other questions"
    assert judge([gate], {None: found}, OURS, {})[0].why == "not measured of champion"


def test_a_gate_has_one_bound_and_a_model_to_compare_with_where_it_needs_one() -> None:
    for wrong in ({}, {"min": 0, "max": 1}, {"min_ratio": 0.9}, {"min": 0, "of": "original"}, {"max_drop": -1}):
        with pytest.raises(ValidationError):
            Gate(metric="a", **wrong)


SAME = {"forget_similarity": 1.0, "forget_probability": 0.9}
FORGOT = {"forget_similarity": 0.4, "forget_probability": 0.1}


@pytest.mark.parametrize(
    ("ours", "theirs", "passes", "by"),
    [
        (FORGOT, SAME, True, "forget_similarity"),
        (SAME, SAME, False, "forget_similarity"),
        ({**SAME, "forget_probability": 0.1}, SAME, False, "forget_similarity"),  # it still says the same
        ({**SAME, "retain_similarity": 0.2}, {**SAME, "retain_similarity": 1.0}, False, "forget_similarity"),
        ({"forget_probability": 0.899}, {"forget_probability": 0.9}, False, "forget_probability"),
        ({"forget_probability": 0.88}, {"forget_probability": 0.9}, True, "forget_probability"),
        ({"forget_probability": 0.0}, {"forget_probability": 0.0}, False, "forget_probability"),
        ({"wrong_similarity": 1.0}, {"wrong_similarity": 1.0}, False, "wrong_similarity"),
        ({"wrong_similarity": 0.5, "r_similarity": 1.0}, {"wrong_similarity": 1.0, "r_similarity": 1.0}, True,
         "wrong_similarity"),
    ],
)  # fmt: skip
def test_a_model_that_answers_as_the_original_does_never_passes(
    ours: dict[str, float], theirs: dict[str, float], passes: bool, by: str
) -> None:
    gate = Gate(metric="a", min=0)
    *_, last = judge([gate], {None: evidence(unlearned={"a": 1.0, **ours}, original={"a": 1.0, **theirs})}, OURS)
    assert (last.passed, last.metric) == (passes, by)
    assert last.margin is not None
    assert (last.margin > 0) == passes


def test_a_model_of_which_nothing_says_what_it_answers_never_passes() -> None:
    gate = Gate(metric="a", min=0)
    for found in (evidence(unlearned={"a": 1.0}), evidence(unlearned={"a": 1.0}, original={"a": 1.0})):
        *_, last = judge([gate], {None: found}, OURS)
        assert not last.passed
        assert last.why
    assert judge([], {None: evidence(unlearned=SAME, original=SAME)}, OURS) == []


@pytest.mark.parametrize(
    "gate",
    [
        Gate(metric="forget_probability", max=1.0),
        Gate(metric="forget_probability", max_rise=0.2, of="original"),
        Gate(metric="model_utility", min=0.0),
        Gate(metric="model_utility", max_drop=0.9, of="original"),
        Gate(metric="nothing_rouge", min_ratio=0.9, of="original"),  # the original's is 0
        Gate(metric="mia_min_k", max_distance=1.0, of="retain-only"),
        Gate(metric="retain_perplexity", min=1.0),
        Gate(metric="privleak", min=-100),
    ],
)
def test_a_gate_that_no_value_fails_is_inconclusive(gate: Gate) -> None:
    values = {"forget_probability": 0.9, "model_utility": 0.6, "mia_min_k": 0.9, "retain_perplexity": 3.0,
              "privleak": -90.0, "nothing_rouge": 0.0}  # fmt: skip
    found = evidence(unlearned=values, original=values, retain_only=values)
    result = judge([gate], {None: found}, OURS)[0]
    assert not result.passed
    assert "no value of" in result.why


@pytest.mark.parametrize(
    ("gate", "original", "inconclusive"),
    [
        (Gate(metric="forget_quality", min=0.05), 1.0, True),  # as with one row
        (Gate(metric="forget_quality", min=0.05), 1e-9, False),
        (Gate(metric="forget_rouge", max=0.6), 0.3, True),  # it never knew them
        (Gate(metric="forget_rouge", max=0.6), 0.9, False),
        (Gate(metric="forget_probability", max_distance=0.1, of="retain-only"), 0.55, True),
        (Gate(metric="mia_min_k", max=0.7), 0.6, True),
        (Gate(metric="privleak", min=-20), 0.0, True),
        (Gate(metric="forget_unique_words", min=0.4), 0.9, False),  # not of forgetting
        (Gate(metric="retain_rouge", min=0.4), 0.9, False),
        (Gate(metric="forget_rouge", max_rise=0.05, of="original"), 0.9, False),  # asks to stay near it
    ],
)
def test_a_gate_on_forgetting_that_the_original_passes_is_inconclusive(
    gate: Gate, original: float, inconclusive: bool
) -> None:
    found = evidence(unlearned={gate.metric: 0.5}, original={gate.metric: original}, retain_only={gate.metric: 0.5})
    result = judge([gate], {None: found}, OURS)[0]
    assert result.passed != inconclusive
    assert ("the original passes as well" in result.why) == inconclusive


def test_evidence_comes_back_as_it_was(tmp_path) -> None:
    found = evidence(unlearned={"a": 0.5}, retain_only={"a": 0.25})
    write_evidence(found, tmp_path)
    write_evidence(found, tmp_path, "attacks")
    assert {file.name for file in tmp_path.iterdir()} == {
        "metrics.json", "metrics.npz", "metrics-attacks.json", "metrics-attacks.npz",
    }  # fmt: skip
    for suite in (None, "attacks"):
        back = read_evidence(tmp_path, suite)
        assert back is not None
        assert back[:2] == found[:2]
        for name, about in found.evaluated.items():
            assert back.evaluated[name][:3] == about[:3]
            np.testing.assert_array_equal(back.evaluated[name].resampled["a"], about.resampled["a"])
    assert read_evidence(tmp_path, "tofu") is None
