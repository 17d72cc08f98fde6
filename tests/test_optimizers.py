"""The optimizers' steps against their formulas, written again with plain tensors."""

import torch

from components.config import Adafactor, AdamW, Influence, Lion, Sgd, Train
from components.config import Soul as SoulConfig
from components.optimizers.choose import learning_rate, make_optimizer
from components.optimizers.soul import Soul, refresh_due

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.8), "gamma": 0.5, "eps": 1e-6, "weight_decay": 0.01}


def test_ten_steps_equal_the_formula() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50))
    optimizer = Soul([p], **SETTINGS)
    theta, m, h = p.detach().double().clone(), torch.zeros(50).double(), torch.zeros(50).double()
    for step in range(10):
        if step % 3 == 0:
            before = p.detach().clone()
            p.grad = torch.randn(50)
            optimizer.refresh_with_square(p, 17.0)
            h = 0.8 * h + 0.2 * 17.0 * p.grad.double() ** 2
            assert torch.equal(before, p.detach())
        p.grad = torch.randn(50)
        optimizer.step()
        m = 0.9 * m + 0.1 * p.grad.double()
        theta = theta * (1 - 0.1 * 0.01) - 0.1 * (m / torch.clamp(0.5 * h, min=1e-6)).clamp(-1, 1)
    torch.testing.assert_close(p.detach().double(), theta, rtol=0, atol=1e-5)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), h, rtol=1e-5, atol=0)
    assert optimizer.state[p]["step"] == 10


def test_without_curvature_the_step_is_the_sign_of_the_momentum() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = Soul([p], **{**SETTINGS, "weight_decay": 0.0})
    p.grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, -0.1, 0.0]))
    assert optimizer.take_clip_counts() == (3, 4)
    assert optimizer.take_clip_counts() == (0, 0)


def test_strong_curvature_makes_a_newton_like_step() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Soul([p], lr=1.0, betas=(0.0, 0.0), gamma=1.0, eps=1e-12)
    p.grad = torch.tensor([2.0])
    optimizer.refresh_with_square(p, 1.0)  # h = 4
    p.grad = torch.tensor([1.0])
    optimizer.step()
    assert p.item() == -0.25
    assert optimizer.take_clip_counts() == (0, 1)


def test_weight_decay_spares_norms_and_biases() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    kinds = {AdamW: "adamw", SoulConfig: "soul", Sgd: "sgd", Lion: "lion", Adafactor: "adafactor"}
    for config in (kind(type=name, weight_decay=0.1) for kind, name in kinds.items()):
        groups = make_optimizer(config, model, 10).param_groups
        assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_learning_rate_schedules() -> None:
    rates = [learning_rate(1.0, Train(warmup_steps=2, schedule="linear"), step, 6) for step in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(1.0, Train(schedule="cosine"), 5, 10) == 0.5
    assert learning_rate(2.0, Train(), 9, 10) == 2.0


def test_preset_equals_the_arithmetic_of_the_published_code() -> None:
    """h first, from the same gradient; m averaged twice; |m| / (ρ·bs·h + 1e-15) at most 1; decay before the step."""
    config = SoulConfig.model_validate({"type": "soul", "preset": "soul-release", "weight_decay": 0.1, "lr": 1e-2})
    assert (config.hessian_interval, config.curvature, config.curvature_of, config.batch_factor) == (
        1, "squared_gradient", "all", 5120,
    )  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, bias=False)
    [p] = model.parameters()
    optimizer = make_optimizer(config, model, 10)
    theta, m, h = p.detach().double().clone(), torch.zeros(5, 6).double(), torch.zeros(5, 6).double()
    for _ in range(8):
        g = torch.randn(5, 6) * 10.0 ** torch.randint(-4, 0, (5, 6))
        p.grad = g.clone()
        optimizer.own_square = config.batch_factor
        optimizer.step()
        h = 0.95 * h + 0.05 * g.double() ** 2
        for _ in range(2):
            m = 0.9 * m + 0.1 * g.double()
        theta = theta * (1 - 1e-2 * 0.1)
        theta = theta - 1e-2 * m.sign() * (m.abs() / (0.04 * 5120 * h + 1e-15)).clamp(max=1)
    torch.testing.assert_close(p.detach().double(), theta, rtol=0, atol=1e-6)
    clipped, size = optimizer.take_clip_counts()
    assert 0 < clipped < size


def test_the_preset_wins_over_what_another_recipe_says_of_the_arithmetic() -> None:
    given = {"type": "soul", "preset": "soul-release", "gamma": 30, "hessian_interval": 5, "lr": 0.5}
    config = SoulConfig.model_validate(given)
    assert (config.gamma, config.hessian_interval, config.batch_factor, config.lr) == (0.04, 1, 5120, 0.5)
    assert SoulConfig.model_validate(config.model_dump()) == config


def test_refresh_is_due_by_interval_or_when_the_clip_fraction_leaves_its_band() -> None:
    fixed = SoulConfig(type="soul", hessian_interval=10)
    assert refresh_due(fixed, None, None)
    assert [refresh_due(fixed, since, 1.0) for since in (1, 9, 10)] == [False, False, True]
    band = {"low": 0.1, "high": 0.5, "soonest": 3}
    adaptive = SoulConfig.model_validate({"type": "soul", "hessian_interval": 10, "adaptive": band})
    assert [refresh_due(adaptive, since, 0.9) for since in (1, 2, 3)] == [False, False, True]
    assert [refresh_due(adaptive, 5, fraction) for fraction in (0.05, 0.1, 0.5, 0.6)] == [True, False, False, True]


def test_influence_moves_once_by_the_averages() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False)
    [p] = model.parameters()
    start = p.detach().clone()
    optimizer = make_optimizer(Influence(type="influence", lr=0.5, damping=0.1), model, 3)
    gradients, estimates = torch.randn(3, 3, 4), torch.randn(3, 3, 4)
    for g, estimate in zip(gradients, estimates, strict=True):
        assert torch.equal(p.detach(), start)
        p.grad = estimate.clone()
        optimizer.refresh_with_square(p, 7.0)
        p.grad = g.clone()
        optimizer.step()
    h = (7 * estimates**2).mean(0)
    torch.testing.assert_close(p.detach(), start - 0.5 * gradients.mean(0) / (h + 0.1))


def test_lion_is_the_sign_of_its_average() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    [p] = model.parameters()
    p.data.zero_()
    optimizer = make_optimizer(Lion(type="lion", lr=0.1, betas=(0.9, 0.99)), model, 10)
    p.grad = torch.tensor([[2.0, -3.0]])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[-0.1, 0.1]]))
    p.grad = torch.tensor([[-1.0, -1.0]])  # 0.9·0.02 − 0.1 < 0 and 0.9·(−0.03) − 0.1 < 0
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0.2]]))
