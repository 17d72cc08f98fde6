"""Gates: conditions on the metrics of a candidate, each judged alone; what is missing or of other questions fails."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from components.config import Gate
from components.console import number, table
from components.evidence import Evidence

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
    """Judge the model with the fingerprint `model` by every gate; no `champion`: there is none yet."""
    return [_judge_one(gate, candidate, model, champion) for gate in gates]


def gate_head() -> tuple[str, ...]:
    """The columns of `gate_cells`."""
    return ("gate", "value", "condition", "bound", "margin", "verdict")


def gate_cells(results: Sequence[GateResult]) -> list[tuple[str, ...]]:
    """Metric, value, condition, bound, margin and verdict of each result, as text."""
    return [
        (
            r.metric, number(r.value) if r.value is not None else "not computed", r.condition, number(r.bound),
            number(r.margin), ("pass" if r.passed else "FAIL") + (f": {r.why}" if r.why else ""),
        )
        for r in results
    ]  # fmt: skip


def gate_table(results: Sequence[GateResult]) -> str:
    """Results as a table for the console."""
    return table(gate_head(), gate_cells(results))


def _judge_one(gate: Gate, candidate: Suites, model: str, champion: Suites | None) -> GateResult:
    name, condition = f"{gate.metric} ({gate.suite})" if gate.suite else gate.metric, _condition(gate)

    def unjudged(why: str, value: float | None = None) -> GateResult:
        return GateResult(name, condition, value, None, None, passed=False, why=why)

    found = candidate.get(gate.suite)
    if found is None or CANDIDATE not in found.evaluated:
        return unjudged(f"no evaluation by {gate.suite}" if gate.suite else "no evaluation")
    if found.models[CANDIDATE] != model:
        return unjudged("evaluation is of another model")
    own = found.evaluated[CANDIDATE]
    value = own.values.get(gate.metric)
    if value is None:
        return unjudged(own.missing.get(gate.metric, "not measured"))
    theirs, drawn = 0.0, own.resampled.get(gate.metric)
    their_drawn: Any = 0.0
    if gate.of:
        if gate.of == "champion" and champion is None:
            return GateResult(name, condition, value, None, None, passed=True, why="no champion yet")
        where = (champion or {}).get(gate.suite) if gate.of == "champion" else found
        other = where.evaluated.get(CANDIDATE if gate.of == "champion" else gate.of) if where else None
        if where is None or other is None or gate.metric not in other.values:
            return unjudged(f"not measured of {gate.of}", value)
        if where.questions != found.questions:
            return unjudged("the champion was asked other questions", value)
        theirs, their_drawn = other.values[gate.metric], other.resampled.get(gate.metric)
    margin = float(_margin(gate, value, theirs))
    if gate.confident:
        if drawn is None or their_drawn is None or (gate.of and len(drawn) != len(their_drawn)):
            return unjudged("no interval", value)
        margin = float(np.percentile(_margin(gate, drawn, their_drawn), 2.5))
    return GateResult(name, condition, value, _bound(gate, theirs), margin, passed=margin >= 0)


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
