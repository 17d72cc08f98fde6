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
    return [r.passed for r in judge(gates, {None: found}, OURS, None if champion is None else {None: champion})]


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
    results = judge(tighter, {None: found}, OURS)
    assert [r.passed for r in results] == [False] * 7
    assert [r.margin for r in results] == pytest.approx([-0.01] * 7)


def test_confidence_asks_the_worse_end_of_the_interval() -> None:
    found = evidence(unlearned={"a": 0.5}, original={"a": 0.55})
    low, high = np.percentile(NOISE, [2.5, 97.5])
    assert verdicts([Gate(metric="a", min=0.4), Gate(metric="a", min=0.4, confident=True)], found) == [True, False]
    assert verdicts([Gate(metric="a", max=0.6, confident=True)], found) == [False]
    bound = Gate(metric="a", min=0.25, confident=True), Gate(metric="a", max=0.75, confident=True)
    assert [r.margin for r in judge(bound, {None: found}, OURS)] == pytest.approx([0.25 + low, 0.25 - high])
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
    results = judge(gates, {None: found}, OURS)
    assert not any(result.passed for result in results)
    assert [result.why for result in results] == [
        "needs x", "not measured", "no evaluation by attacks", "not measured of original",
        "not measured of retain-only",
    ]  # fmt: skip
    text = gate_table(results)
    assert text.count("FAIL") == 5
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
