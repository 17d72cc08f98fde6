"""The SOUL step against its formula, written again with plain tensors."""

import torch

from components.config import AdamW, Train
from components.config import Soul as SoulConfig
from components.optimizers.choose import learning_rate, make_optimizer
from components.optimizers.soul import Soul

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
            optimizer.mode, optimizer.hessian_tokens = "hessian", 17.0
            optimizer.step()
            optimizer.mode = "parameters"
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
    optimizer.mode = "hessian"
    optimizer.step()  # h = 4
    optimizer.mode = "parameters"
    p.grad = torch.tensor([1.0])
    optimizer.step()
    assert p.item() == -0.25
    assert optimizer.take_clip_counts() == (0, 1)


def test_weight_decay_spares_norms_and_biases() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    for config in (AdamW(type="adamw", weight_decay=0.1), SoulConfig(type="soul", weight_decay=0.1)):
        groups = make_optimizer(config, model).param_groups
        assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_learning_rate_schedules() -> None:
    rates = [learning_rate(1.0, Train(warmup_steps=2, schedule="linear"), step, 6) for step in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(1.0, Train(schedule="cosine"), 5, 10) == 0.5
    assert learning_rate(2.0, Train(), 9, 10) == 2.0
