"""Each term against a closed form, its gradient's sign, and an independent float64 computation."""

import json
import math
import re

import pytest
import torch

from components.config import Objective
from components.objectives.terms import TERMS, cross_entropy, gradient_ascent, kl_to_original


def test_every_configured_term_has_a_function() -> None:
    schema = json.dumps(Objective.model_json_schema())
    assert set(TERMS) == set(re.findall(r'"const": "(\w+)"', schema))


def test_three_tokens_in_closed_form() -> None:
    logp = torch.tensor([[math.log(0.5), math.log(0.25)], [math.log(0.1), -99.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    expected = math.log(0.5 * 0.25 * 0.1)
    assert gradient_ascent(logp, mask)[0].item() == pytest.approx(expected)
    assert cross_entropy(logp, mask)[0].item() == pytest.approx(-expected)
    assert gradient_ascent(logp, mask)[1]["token_probability"].item() == pytest.approx(0.85)


def test_kl_of_two_coins_in_closed_form() -> None:
    original = torch.tensor([[math.log(0.5), math.log(0.5)]])
    current = torch.tensor([[math.log(0.9), math.log(0.1)]])
    total, metrics = kl_to_original(current, original)
    assert total.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert metrics["agreement"].item() == 1


def test_kl_is_zero_with_zero_gradient_where_both_agree() -> None:
    logits = torch.randn(5, 11, dtype=torch.float64).requires_grad_()
    total, _ = kl_to_original(logits, logits.detach() + 3.0)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-5)
    assert logits.grad.abs().max() < 1e-6


def test_kl_points_from_original_to_current() -> None:
    """KL(original ‖ current) is infinite where the original has mass and the current none, not the other way round."""
    sharp, flat = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_to_original(sharp, flat)[0] > 10
    assert kl_to_original(flat, sharp)[0] < 1


@pytest.mark.parametrize(("function", "sign"), [(gradient_ascent, 1), (cross_entropy, -1)])
def test_descending_moves_the_answer_the_right_way(function, sign: int) -> None:
    logits = torch.randn(4, 7, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 3, 6, 2])
    logp = torch.log_softmax(logits, -1)[torch.arange(4), targets].reshape(2, 2)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    function(logp, mask)[0].backward()
    at_target = logits.grad[torch.arange(4), targets]
    assert (sign * at_target[:3] > 0).all()
    assert (logits.grad[3] == 0).all()  # masked


def test_gradient_of_cross_entropy_is_softmax_minus_one_hot() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([1, 4, 0])
    logp = torch.log_softmax(logits, -1)[torch.arange(3), targets].reshape(1, 3)
    cross_entropy(logp, torch.ones(1, 3))[0].backward()
    expected = torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(targets, 5)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)
