"""Gates: conditions on the metrics of a candidate, each judged alone.

A gate that cannot judge is inconclusive, which is a failure with its reason: the metric is missing or of other
questions, no value could fail, or the original passes a gate on forgetting. Beside the recipe's gates, no model passes
that answers as the original does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from components.config import Gate
from components.console import number, table
from components.evidence import Evidence, attainable, tells_forgetting

CANDIDATE = "unlearned"
Suites = Mapping[str | None, Evidence]
"""What was found of a model, by suite; None: by the recipe's own evaluation."""


class GateResult(NamedTuple):
    """One gate's verdict; value, bound and margin are None where they could not be computed."""

    metric: str
    condition: str
    value: float | None
    bound: float | None
    margin: float | None
    """How far inside the bound it is, or, below 0, how far outside; of the interval's worse end where asked."""
    passed: bool
    why: str = ""
    """What could not be judged."""


def judge(gates: Sequence[Gate], candidate: Suites, model: str, champion: Suites | None = None) -> list[GateResult]:
    """Judge the model with the fingerprint `model` by every gate; no `champion`: there is none yet.

    Where there are gates, the last result says whether the model answers otherwise than the original.
    """
    results = [_judge_one(gate, candidate, model, champion) for gate in gates]
    return [*results, _differs(candidate.get(None), model)] if gates else []


def is_of_run(gate: Gate) -> bool:
    """Whether a run's own evaluation is enough to judge a gate; the others are for promotion."""
    return not gate.suite and gate.of != "champion"


def gate_head() -> tuple[str, ...]:
    """The columns of `gate_cells`."""
    return ("gate", "value", "condition", "bound", "margin", "verdict")


def gate_cells(results: Sequence[GateResult]) -> list[tuple[str, ...]]:
    """Metric, value, condition, bound, margin and verdict of each result, as text."""
    return [
        (
            r.metric, number(r.value) if r.value is not None else "not computed", r.condition, number(r.bound),
            number(r.margin), ("pass" if r.passed else "FAIL") + _reason(r),
        )
        for r in results
    ]  # fmt: skip


def gate_table(results: Sequence[GateResult]) -> str:
    """Results as a table for the console."""
    return table(gate_head(), gate_cells(results))


def _reason(result: GateResult) -> str:
    if not result.why:
        return ""
    return f": {result.why}" if result.passed else f", inconclusive: {result.why}"


def _differs(found: Evidence | None, model: str) -> GateResult:
    """Whether the answers are other ones than the original's: to what is to be forgotten, else to all questions.

    By the generated answers, else by the probability of the right ones, of which 1 % must be gone.
    """
    if found is None or not {CANDIDATE, "original"} <= {*found.evaluated} or found.models[CANDIDATE] != model:
        return _inconclusive(_DIFFERS, "the recipe's own questions were not put to it and the original")
    ours, theirs = (found.evaluated[name].values for name in (CANDIDATE, "original"))
    for kind, ratio in (("similarity", 1.0), ("probability", 0.99)):
        names = [name for name in ours if name.endswith(f"_{kind}") and name in theirs]
        names = [name for name in names if name == f"forget_{kind}"] or names
        if names:
            margin, name = max((ratio * theirs[name] - ours[name], name) for name in names)
            bound = ratio * theirs[name]
            return GateResult(name, f"< {ratio:g} x original", ours[name], bound, margin, passed=margin > 0)
    return _inconclusive(_DIFFERS, "nothing says what it answers: measure forget_similarity or forget_probability")


_DIFFERS = ("forget_similarity", "< 1 x original")


def _inconclusive(
    gate: tuple[str, str], why: str, value: float | None = None, bound: float | None = None
) -> GateResult:
    return GateResult(*gate, value, bound, None, passed=False, why=why)


def _cannot_fail(gate: Gate, bound: Any) -> bool:
    """Whether every value that the metric can have is within the gate's bound."""
    low, high = attainable(gate.metric)
    kind, limit = gate.bound
    if kind == "max_distance":
        return bool(limit >= high - low)
    return bool(bound >= high if kind in ("max", "max_rise") else bound <= low)


def _original_passes(gate: Gate, found: Evidence, theirs: float) -> bool:
    """Whether a gate on forgetting, with a bound of `theirs`, holds for the model that has forgotten nothing."""
    original = found.evaluated.get("original")
    if not original or not tells_forgetting(gate.metric) or gate.of in ("original", "champion"):
        return False
    return gate.metric in original.values and bool(_margin(gate, original.values[gate.metric], theirs) >= 0)


def _judge_one(gate: Gate, candidate: Suites, model: str, champion: Suites | None) -> GateResult:
    named = f"{gate.metric} ({gate.suite})" if gate.suite else gate.metric, _condition(gate)
    found = candidate.get(gate.suite)
    if found is None or CANDIDATE not in found.evaluated:
        return _inconclusive(named, f"no evaluation by {gate.suite}" if gate.suite else "no evaluation")
    if found.models[CANDIDATE] != model:
        return _inconclusive(named, "evaluation is of another model")
    own = found.evaluated[CANDIDATE]
    value = own.values.get(gate.metric)
    if value is None:
        return _inconclusive(named, own.missing.get(gate.metric, "not measured"))
    theirs, drawn = 0.0, own.resampled.get(gate.metric)
    their_drawn: Any = 0.0
    if gate.of:
        if gate.of == "champion" and champion is None:
            return GateResult(*named, value, None, None, passed=True, why="no champion yet")
        where = (champion or {}).get(gate.suite) if gate.of == "champion" else found
        other = where.evaluated.get(CANDIDATE if gate.of == "champion" else gate.of) if where else None
        if where is None or other is None or gate.metric not in other.values:
            return _inconclusive(named, f"not measured of {gate.of}", value)
        if where.questions != found.questions:
            return _inconclusive(named, "the champion was asked other questions", value)
        theirs, their_drawn = other.values[gate.metric], other.resampled.get(gate.metric)
    bound, margin = _bound(gate, theirs), float(_margin(gate, value, theirs))
    if _cannot_fail(gate, bound):
        return _inconclusive(named, f"no value of {gate.metric} could fail", value, bound)
    if _original_passes(gate, found, theirs):
        return _inconclusive(named, "the original passes as well, so this does not show forgetting", value, bound)
    if gate.confident:
        if drawn is None or their_drawn is None or (gate.of and len(drawn) != len(their_drawn)):
            return _inconclusive(named, "no interval", value)
        margin = float(np.percentile(_margin(gate, drawn, their_drawn), 2.5))
    return GateResult(*named, value, bound, margin, passed=margin >= 0)


def _bound(gate: Gate, theirs: Any) -> Any:
    kind, limit = gate.bound
    return {
        "min": limit, "max": limit, "max_distance": limit,
        "min_ratio": limit * theirs, "max_drop": theirs - limit, "max_rise": theirs + limit,
    }[kind]  # fmt: skip


def _margin(gate: Gate, ours: Any, theirs: Any) -> Any:
    kind, bound = gate.bound[0], _bound(gate, theirs)
    if kind == "max_distance":
        return bound - abs(ours - theirs)
    return bound - ours if kind in ("max", "max_rise") else ours - bound


def _condition(gate: Gate) -> str:
    kind, limit = gate.bound
    text = {
        "min": ">=", "max": "<=", "min_ratio": f">= {limit:g} x {gate.of}", "max_drop": f">= {gate.of} - {limit:g}",
        "max_rise": f"<= {gate.of} + {limit:g}", "max_distance": f"around {gate.of}",
    }[kind]  # fmt: skip
    return text + ", 95 %" * gate.confident
