"""Weights that change: closed forms, no model."""

from typing import Any

import pytest

from components.config import Objective
from components.objectives.weights import balance_due, balanced, dual_step, first_learnt, weights_at


def objective(normal_weight: Any) -> Objective:
    return Objective.model_validate(
        {
            "forget": {"type": "gradient_ascent", "weight": 0.5},
            "normal": {"type": "nll", "weight": normal_weight},
        }
    )


def test_a_ramp_by_epochs_is_souls_and_by_steps_is_smooth() -> None:
    by_epoch = objective({"type": "ramp", "start": 0.0, "end": 2.0})
    found = [weights_at(by_epoch, step, steps=12, steps_per_epoch=3, learnt={})["normal"] for step in range(12)]
    assert found == [0.0] * 3 + [0.5] * 3 + [1.0] * 3 + [1.5] * 3  # γ·epoch/epochs
    by_step = objective({"type": "ramp", "start": 1.0, "end": 3.0, "every": "step"})
    assert [weights_at(by_step, s, 4, 2, {})["normal"] for s in range(4)] == [1.0, 1.5, 2.0, 2.5]
    assert weights_at(by_step, 3, 4, 2, {})["forget"] == 0.5


def test_the_dual_variable_grows_while_the_constraint_is_broken_and_never_below_zero() -> None:
    config = objective({"type": "dual", "bound": 0.3, "rate": 5.0, "start": 2.0, "warmup_epochs": 1})
    learnt = first_learnt(config)
    assert learnt == {"normal": 2.0}
    assert dual_step(config, learnt, {"normal": 1.3}, epoch=0) == learnt
    learnt = dual_step(config, learnt, {"normal": 1.3}, epoch=1)
    assert learnt["normal"] == pytest.approx(2.0 + 5.0 * 1.0)
    assert weights_at(config, 7, 10, 5, learnt)["normal"] == pytest.approx(7.0)
    assert dual_step(config, {"normal": 0.5}, {"normal": 0.1}, epoch=2) == {"normal": 0.0}


def test_a_balanced_weight_gives_the_gradient_its_share() -> None:
    config = objective({"type": "balanced", "ratio": 2.0, "every": 4, "largest": 50.0})
    assert [balance_due(config, step) for step in (0, 1, 4)] == [("forget", "normal"), (), ("forget", "normal")]
    weights = {"forget": 0.5, "normal": 0.0}
    learnt = balanced(config, first_learnt(config), weights, {"forget": 6.0, "normal": 0.25})
    assert learnt["normal"] * 0.25 == pytest.approx(2.0 * 0.5 * 6.0)
    assert balanced(config, learnt, weights, {"forget": 6.0, "normal": 0.0}) == {"normal": 50.0}
    assert balanced(config, learnt, weights, {"forget": 6.0, "normal": 1e-9}) == {"normal": 50.0}
    assert balance_due(objective(1.0), 0) == ()
