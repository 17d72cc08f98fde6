"""Gates: conditions on the metrics of a candidate, each judged alone; a missing metric fails."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from components.config import Gate
from components.console import number, table


class GateResult(NamedTuple):
    """One gate's verdict; value or bound is None where it could not be computed."""

    metric: str
    condition: str
    value: float | None
    bound: float | None
    passed: bool


def judge(gates: Sequence[Gate], candidate: Mapping[str, float], original: Mapping[str, float]) -> list[GateResult]:
    """Judge every gate; `original` serves those that compare with the original model."""
    return [_judge_one(gate, candidate.get(gate.metric), original.get(gate.metric)) for gate in gates]


def _judge_one(gate: Gate, value: float | None, original: float | None) -> GateResult:
    bound: float | None
    if gate.min is not None:
        bound, condition, holds = gate.min, ">=", lambda v, b: v >= b
    elif gate.max is not None:
        bound, condition, holds = gate.max, "<=", lambda v, b: v <= b
    else:
        assert gate.min_of_original is not None
        bound = None if original is None else gate.min_of_original * original
        condition, holds = f">= {gate.min_of_original:g} x original", lambda v, b: v >= b
    passed = value is not None and bound is not None and holds(value, bound)
    return GateResult(gate.metric, condition, value, bound, passed)


def gate_cells(results: Sequence[GateResult]) -> list[tuple[str, ...]]:
    """Metric, value, condition, bound and verdict of each result, as text."""
    return [
        (
            r.metric,
            number(r.value) if r.value is not None else "not computed",
            r.condition,
            number(r.bound),
            "pass" if r.passed else "FAIL",
        )
        for r in results
    ]


def gate_table(results: Sequence[GateResult]) -> str:
    """Results as a table for the console."""
    return table(("gate", "value", "condition", "bound", "verdict"), gate_cells(results))
