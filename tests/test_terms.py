"""Each term against a closed form, its gradient's sign, and an independent float64 computation."""

import inspect
import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from components.config import Objective
from components.objectives.forget import (
    ce_u,
    dpo,
    gradient_ascent,
    kl_ascent,
    logit_flattening,
    max_entropy,
    npo,
    rmu,
    simnpo,
    undial,
)
from components.objectives.keep import cross_entropy, embedding_difference, kl_to_original
from components.objectives.terms import TERMS


def test_every_configured_term_has_a_function() -> None:
    schema = json.dumps(Objective.model_json_schema())
    weights = {"ramp", "balanced", "dual"}
    assert set(TERMS) == set(re.findall(r'"const": "(\w+)"', schema)) - weights - {"custom"}


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


# --- every term against loops over single numbers, in float64 ---------------------------------------------------------

SETTINGS: dict[str, dict[str, float]] = {
    "bounded_ascent": {"bound": 1.5}, "npo": {"beta": 0.3}, "simnpo": {"beta": 2.5, "margin": 0.4},
    "wga": {"beta": 0.7}, "satimp": {"beta1": 2.0, "beta2": 0.5}, "undial": {"beta": 3.0}, "dpo": {"beta": 0.4},
    "rmu": {"coefficient": 2.0},
}  # fmt: skip
LENGTHS = [3, 1, 4]


def ragged(seed: int = 0, vocabulary: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the original's logits and targets of three answers of 3, 1 and 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(LENGTHS), vocabulary)
    logits, original = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, original, torch.randint(vocabulary, (shape[0],), generator=generator)


DIRECTION = torch.tensor([0.6, 0.8, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def chosen(z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two chosen answers for each row, made up from those of its own answer and as long."""
    return z.flip(-1), 0.5 * z.roll(1, -1)


def evaluate(name: str, logits: Tensor, original: Tensor, targets: Tensor, lengths: list[int], pad: int = 0) -> Tensor:
    """The term as the loop calls it, from flat logits, with `pad` more columns of padding than needed."""
    mask = (torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]).double()

    def padded(z: Tensor) -> Tensor:
        flat = torch.log_softmax(z.double(), -1).gather(-1, targets[:, None]).squeeze(-1)
        return torch.zeros_like(mask).masked_scatter(mask.bool(), flat)

    def padded_chosen(z: Tensor) -> Tensor:
        return torch.stack([padded(part) for part in chosen(z)], dim=1).flatten(0, 1)  # those of a row side by side

    available = {
        "logp": padded(logits), "original_logp": padded(original).detach(), "mask": mask, "logits": logits,
        "original_logits": original, "targets": targets, "states": logits, "original_states": original,
        "direction": DIRECTION, "chosen_logp": padded_chosen(logits),
        "chosen_original_logp": padded_chosen(original).detach(), "chosen_mask": mask.repeat_interleave(2, 0),
    }  # fmt: skip
    term = TERMS[name]
    assert set(inspect.signature(term.function).parameters) == {*term.inputs, *SETTINGS.get(name, {})}
    total, metrics = term.function(**{key: available[key] for key in term.inputs}, **SETTINGS.get(name, {}))
    assert not any(value.requires_grad for value in metrics.values())
    return total


def distribution(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def by_hand(name: str, logits: Tensor, original: Tensor, targets: Tensor, lengths: list[int]) -> float:
    """The paper's formula, token by token."""
    h = SETTINGS.get(name, {})
    total, place = 0.0, 0
    for length in lengths:
        here = range(place, place + length)
        place += length
        p = [distribution(logits[t].detach().numpy()) for t in here]
        q = [distribution(original[t].numpy()) for t in here]
        y = [int(targets[t]) for t in here]
        ce = [-math.log(p_t[y_t]) for p_t, y_t in zip(p, y, strict=True)]
        ce_original = [-math.log(q_t[y_t]) for q_t, y_t in zip(q, y, strict=True)]
        m = [(p_t + q_t) / 2 for p_t, q_t in zip(p, q, strict=True)]
        if name == "gradient_ascent":
            total -= sum(ce)
        elif name in ("nll", "random_response"):
            total += sum(ce)
        elif name == "bounded_ascent":
            total -= sum(min(c, h["bound"]) for c in ce)
        elif name == "npo":
            ratio = math.exp(-sum(ce)) / math.exp(-sum(ce_original))
            total += 2 / h["beta"] * math.log(1 + ratio ** h["beta"])  # the paper's other form of it
        elif name == "simnpo":
            inner = -h["beta"] / length * -sum(ce) - h["margin"]
            total += -2 / h["beta"] * math.log(1 / (1 + math.exp(-inner)))
        elif name == "wga":
            total -= sum(math.exp(-c) ** h["beta"] * c for c in ce)
        elif name == "satimp":
            total -= sum(math.exp(-c) ** h["beta1"] * (1 - math.exp(-c)) ** h["beta2"] * c for c in ce)
        elif name == "ce_u":
            for p_t, y_t in zip(p, y, strict=True):
                rest = [v for v in range(len(p_t)) if v != y_t]
                total -= sum(p_t[v] / (1 - p_t[y_t]) * math.log(p_t[v]) for v in rest)
        elif name == "undial":
            for k, t in enumerate(here):
                z = original[t].numpy().copy()
                z[y[k]] -= h["beta"]
                total -= sum(a * math.log(b) for a, b in zip(distribution(z), p[k], strict=True))
        elif name == "kl_ascent":
            total -= sum(
                b * math.log(b / a) for p_t, q_t in zip(p, q, strict=True) for a, b in zip(p_t, q_t, strict=True)
            )
        elif name == "max_entropy":
            total += sum(a * math.log(a * len(p_t)) for p_t in p for a in p_t)
        elif name == "logit_flattening":
            total += sum((max(z) - sum(z) / len(z)) ** 2 for z in (logits[t].tolist() for t in here))
        elif name in ("rmu", "embedding_difference"):
            for t in here:
                goal = [h["coefficient"] * u for u in DIRECTION.tolist()] if name == "rmu" else original[t].tolist()
                total += sum((a - b) ** 2 for a, b in zip(logits[t].tolist(), goal, strict=True)) / len(goal)
        elif name == "dpo":
            for k in range(2):
                own, reference = (
                    sum(
                        math.log(distribution(chosen(z)[k][t].detach().numpy())[y_t])
                        for t, y_t in zip(here, y, strict=True)
                    )
                    for z in (logits, original)
                )
                inner = h["beta"] * ((own - reference) - (sum(ce_original) - sum(ce)))
                total += -2 / h["beta"] * math.log(1 / (1 + math.exp(-inner))) / 2  # the mean over the two chosen
        elif name == "kl_to_original":
            total += sum(
                b * math.log(b / a) for p_t, q_t in zip(p, q, strict=True) for a, b in zip(p_t, q_t, strict=True)
            )
        elif name == "reverse_kl":
            total += sum(
                a * math.log(a / b) for p_t, q_t in zip(p, q, strict=True) for a, b in zip(p_t, q_t, strict=True)
            )
        elif name == "jensen_shannon":
            for p_t, q_t, m_t in zip(p, q, m, strict=True):
                total += (
                    sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p_t, q_t, m_t, strict=True)) / 2
                )
        else:
            raise AssertionError(name)
    return total


ALL = pytest.mark.parametrize("name", sorted(TERMS))


@ALL
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_papers_formula(name: str, seed: int) -> None:
    logits, original, targets = ragged(seed)
    expected = by_hand(name, logits, original, targets, LENGTHS)
    assert evaluate(name, logits, original, targets, LENGTHS).item() == pytest.approx(expected, rel=1e-10)


# For weights taken as constants the gradient is not the derivative of the value: see the test below.
@pytest.mark.parametrize("name", sorted(set(TERMS) - {"wga", "satimp", "ce_u"}))
def test_gradient_equals_finite_differences(name: str) -> None:
    logits, original, targets = ragged()
    value: Callable[[Tensor], Tensor] = lambda z: evaluate(name, z, original, targets, LENGTHS)  # noqa: E731
    assert torch.autograd.gradcheck(value, logits.requires_grad_(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["wga", "satimp", "ce_u"])
def test_gradient_with_constant_weights_equals_finite_differences(name: str) -> None:
    """The weights (or the target distribution) are computed once, at the point where the gradient is taken."""
    logits, _, targets = ragged()
    p = torch.softmax(logits, -1)
    at = p.gather(-1, targets[:, None]).squeeze(-1)
    if name == "ce_u":
        weights = -p.scatter(-1, targets[:, None], 0.0) / (1 - at)[:, None]
    else:
        h = SETTINGS[name]
        weight = at ** h["beta"] if name == "wga" else at ** h["beta1"] * (1 - at) ** h["beta2"]
        weights = torch.zeros_like(p).scatter(-1, targets[:, None], weight[:, None])
    step = 1e-6
    expected = torch.zeros_like(logits)
    for i in range(logits.shape[0]):
        for v in range(logits.shape[1]):
            shift = torch.zeros_like(logits)
            shift[i, v] = step
            up, down = ((weights * torch.log_softmax(z, -1)).sum() for z in (logits + shift, logits - shift))
            expected[i, v] = (up - down) / (2 * step)
    leaf = logits.clone().requires_grad_()
    evaluate(name, leaf, logits, targets, LENGTHS).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


@ALL
def test_padding_order_and_micro_batches_change_nothing(name: str) -> None:
    logits, original, targets = ragged()
    whole = evaluate(name, logits, original, targets, LENGTHS).item()
    assert evaluate(name, logits, original, targets, LENGTHS, pad=5).item() == pytest.approx(whole, rel=1e-12)
    order = [4, 5, 6, 7, 3, 0, 1, 2]
    turned = evaluate(name, logits[order], original[order], targets[order], LENGTHS[::-1]).item()
    assert turned == pytest.approx(whole, rel=1e-12)
    parts = [(slice(0, 3), [3]), (slice(3, 8), [1, 4])]
    split = sum(evaluate(name, logits[s], original[s], targets[s], lengths).item() for s, lengths in parts)
    assert split == pytest.approx(whole, rel=1e-12)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_without_rows_gives_zero(name: str, dtype: torch.dtype) -> None:
    logits, nothing = torch.zeros(0, 6, dtype=dtype, requires_grad=True), torch.empty(0, dtype=torch.long)
    mask = torch.zeros(0, 1)
    available = {
        "logp": logits.sum() * mask, "original_logp": mask, "mask": mask, "logits": logits,
        "original_logits": logits.detach(), "targets": nothing, "states": logits, "original_states": logits.detach(),
        "direction": torch.ones(6), "chosen_logp": logits.sum() * mask, "chosen_original_logp": mask,
        "chosen_mask": mask,
    }  # fmt: skip
    term = TERMS[name]
    total, metrics = term.function(**{key: available[key] for key in term.inputs}, **SETTINGS.get(name, {}))
    assert total.item() == 0
    assert all(value.item() == 0 for value in metrics.values())


FORGET = ["gradient_ascent", "bounded_ascent", "npo", "simnpo", "dpo", "wga", "satimp", "ce_u", "undial"]


@pytest.mark.parametrize("name", FORGET)
def test_descending_a_forget_term_makes_the_answers_less_likely(name: str) -> None:
    logits, original, targets = ragged()
    logits = original.clone().requires_grad_()
    before = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).sum().item()
    evaluate(name, logits, original, targets, LENGTHS).backward()
    after = torch.log_softmax(logits.detach() - 0.1 * logits.grad, -1).gather(-1, targets[:, None]).sum().item()
    assert after < before


@pytest.mark.parametrize("name", ["kl_to_original", "reverse_kl", "jensen_shannon"])
def test_divergences_are_zero_where_both_agree_and_positive_elsewhere(name: str) -> None:
    logits, original, targets = ragged()
    same = original.clone().requires_grad_()
    total = evaluate(name, same, original, targets, LENGTHS)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert same.grad.abs().max() < 1e-12
    assert evaluate(name, logits, original, targets, LENGTHS).item() > 0.1
    if name == "jensen_shannon":
        assert evaluate(name, 100 * logits, -100 * logits, targets, LENGTHS).item() < 8 * math.log(2) + 1e-9


def test_npo_at_the_original_and_in_its_limits() -> None:
    """At the original: (2/β) log 2 a row, and gradient ascent's gradient; with β → 0 everywhere (2404.05868, §3)."""
    logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    total, _ = npo(logp, logp.detach(), mask, beta=0.5)
    total.backward()
    assert total.item() == pytest.approx(2 * 4 * math.log(2))
    torch.testing.assert_close(logp.grad, mask)
    logp.grad = None
    npo(logp, logp.detach() + 3.0, mask, beta=1e-9)[0].backward()
    torch.testing.assert_close(logp.grad, mask, rtol=1e-6, atol=1e-6)
    logp.grad = None
    npo(logp, logp.detach() + 100.0, mask, beta=1.0)[0].backward()  # far below the original: it lets go
    assert logp.grad.abs().max() < 1e-20


def test_simnpo_of_one_row_in_closed_form() -> None:
    logp, mask = torch.tensor([[math.log(0.5), math.log(0.125)]]), torch.ones(1, 2)
    # mean log p = log 1/4; β = 2, γ = 0: −(2/2) log σ(−2 log 1/4) = log(1 + (1/4)²)
    assert simnpo(logp, mask, beta=2.0, margin=0.0)[0].item() == pytest.approx(math.log(1 + 1 / 16), rel=1e-6)


def test_ce_u_and_undial_on_three_tokens_in_closed_form() -> None:
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    y = torch.tensor([0])
    assert ce_u(z, y)[0].item() == pytest.approx(math.log(4))  # half on each of the two others, each at 1/4
    # Lowered by log 2, the original is uniform: the mean of −log p.
    assert undial(z, z, y, beta=math.log(2))[0].item() == pytest.approx((math.log(2) + 2 * math.log(4)) / 3)


def test_dpo_at_the_original_and_without_a_chosen_answer() -> None:
    """(2/β) log 2 a row, with the gradient of log p(y_l) − log p(y_w); NPO is what remains without y_w."""
    logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[-3.0], [-4.0]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones_like(wanted)
    total, _ = dpo(logp, logp.detach(), mask, wanted, wanted.detach(), ones, beta=0.5)
    total.backward()
    assert total.item() == pytest.approx(2 * 4 * math.log(2))
    torch.testing.assert_close(logp.grad, mask)
    torch.testing.assert_close(wanted.grad, -ones)
    alone = dpo(logp, logp.detach() - 0.7 * mask, mask, wanted, wanted.detach(), ones, beta=0.5)[0]
    assert alone.item() == pytest.approx(npo(logp, logp.detach() - 0.7 * mask, mask, beta=0.5)[0].item())


def test_distributions_and_activations_in_closed_form() -> None:
    coins = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
    y = torch.tensor([0, 0])
    h = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert max_entropy(coins, y)[0].item() == pytest.approx(math.log(2) - h)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_ascent(coins[:1], coins[1:], y[:1])[0].item() == pytest.approx(-kl)
    assert logit_flattening(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]), y)[0].item() == pytest.approx(9.0)
    state = torch.tensor([[3.0, 0.0]])
    assert rmu(state, torch.tensor([0.6, 0.8]), coefficient=5.0)[0].item() == pytest.approx(16 / 2)
    assert embedding_difference(state, torch.tensor([[1.0, 1.0]]))[0].item() == pytest.approx(5 / 2)


@pytest.mark.parametrize("name", ["max_entropy", "logit_flattening", "rmu"])
def test_descending_brings_distributions_and_activations_to_their_goal(name: str) -> None:
    logits, original, targets = ragged()
    before = evaluate(name, logits.requires_grad_(), original, targets, LENGTHS)
    before.backward()
    after = evaluate(name, logits.detach() - 0.02 * logits.grad, original, targets, LENGTHS)
    assert after.item() < before.item()


def test_bf16_is_summed_in_fp32() -> None:
    logits, original, targets = ragged(vocabulary=50)
    for name in ("kl_to_original", "reverse_kl", "jensen_shannon", "ce_u", "undial", "kl_ascent", "max_entropy"):
        low = evaluate(name, logits.bfloat16().requires_grad_(), original.bfloat16(), targets, LENGTHS)
        assert low.dtype == torch.float32
        exact = evaluate(name, logits.bfloat16().double(), original.bfloat16().double(), targets, LENGTHS)
        assert low.item() == pytest.approx(exact.item(), rel=1e-5)
