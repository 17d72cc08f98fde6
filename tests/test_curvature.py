"""Estimates of the Hessian's diagonal: right in expectation, through DeepSpeed, and without touching anything else."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.config import Nll, Objective, Soul
from components.models import load_model
from components.training.curvature import refresh_curvature, sample_labels
from components.training.engine import consolidated_state, optimizer_parameters
from components.training.loop import set_up
from components.training.passes import Setup, Step
from components.training.step import step_of
from tests.training import OBJECTIVE, TRAIN

NORM = "model.layers.0.input_layernorm.weight"
PASSES = 500


def test_gnb_of_a_softmax_is_the_gauss_newton_diagonal_in_expectation() -> None:
    """Linear softmax: the exact diagonal for weight (v, d) is the mean over tokens of p_v (1 − p_v) x_d²."""
    rng = np.random.default_rng(0)
    w, x = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((5, 3), (8, 3)))
    p = torch.softmax(x @ w.T, -1)
    exact = torch.einsum("nv,nd->vd", p * (1 - p), x**2) / 8
    draws = 40_000
    estimate = torch.zeros_like(w)
    for _ in range(draws // 100):
        labels = sample_labels((x @ w.T).repeat(100, 1), torch.from_numpy(rng.random(800))).reshape(100, 8)
        error = p - torch.nn.functional.one_hot(labels, 5)
        g = torch.einsum("knv,nd->kvd", error, x) / 8
        estimate += 8 * (g**2).sum(0)
    # Each draw scatters by about √2 of the value: 3 % leaves four standard deviations for the worst of 15.
    torch.testing.assert_close(estimate / draws, exact, rtol=0.03, atol=0)


@pytest.fixture
def setup(make_job: Any) -> Any:
    def make(**optimizer: Any) -> tuple[Setup, Step]:
        """Training of one norm's weights alone, by next-token loss on normal rows."""
        job = make_job(
            "curvature", TRAIN.model_copy(update={"zero_stage": 2, "trainable": NORM.replace(".", r"\.")}),
            objective=Objective(normal=Nll(type="nll")), forget=None, random=None,
            optimizer=Soul.model_validate({"type": "soul", "betas": [0.9, 0.0], **optimizer}),
        )  # fmt: skip
        ready, _ = set_up(job, 0, 1, torch.device("cpu"))
        return ready, step_of(ready, 0)

    return make


def mean_of_estimates(ready: Setup, step: Step) -> torch.Tensor:
    """h after each of many passes with fresh random numbers, β2 being 0."""
    [p] = optimizer_parameters(ready.engine)
    total = torch.zeros(32)
    for number in range(PASSES):
        refresh_curvature(ready, step._replace(number=number), {"normal": 1.0})
        total += ready.optimizer.state[p]["exp_avg_sq"][:32]
    return total / PASSES


def shifted(ready: Setup, i: int, by: float) -> Any:
    """A float64 copy of the model with element i of the norm moved."""
    model = load_model(Path(ready.job.model)).double()
    dict(model.named_parameters())[NORM].data[i] += by
    return model


def test_gnb_of_a_transformer_is_the_gauss_newton_diagonal_in_expectation(setup: Any) -> None:
    """Against Jacobians of the logits by central differences in float64: mean over tokens of Jᵀ(diag p − p pᵀ)J."""
    ready, step = setup()
    [batch] = ready.batcher._replace(micro_batch_size=8).micro_batches(step.rows, ("normal",))

    def logits(i: int, by: float) -> torch.Tensor:
        with torch.no_grad():
            return shifted(ready, i, by)(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]

    p = torch.softmax(logits(0, 0.0), -1)
    exact = torch.zeros(32, dtype=torch.float64)
    for i in range(32):
        j = (logits(i, 1e-4) - logits(i, -1e-4)) / 2e-4
        exact[i] = ((p * j**2).sum(-1) - (p * j).sum(-1) ** 2).mean()
    estimate = mean_of_estimates(ready, step).double()
    assert (estimate - exact).norm() / exact.norm() < 0.12  # √2/√500 is 0.06
    assert estimate.sum() / exact.sum() == pytest.approx(1, abs=0.05)


def test_hutchinson_is_the_hessian_diagonal_in_expectation(setup: Any) -> None:
    """Against central differences of the gradient in float64."""
    ready, step = setup(curvature="hutchinson")
    [batch] = ready.batcher._replace(micro_batch_size=8).micro_batches(step.rows, ("normal",))

    def slope(i: int, by: float) -> float:
        model = shifted(ready, i, by)
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
        loss = torch.nn.functional.cross_entropy(logits, batch.groups["normal"].targets)
        return float(torch.autograd.grad(loss, dict(model.named_parameters())[NORM])[0][i])

    exact = torch.tensor([(slope(i, 1e-3) - slope(i, -1e-3)) / 2e-3 for i in range(32)])
    estimate = mean_of_estimates(ready, step)
    # What stands beside the diagonal scatters each draw by about twice the diagonal: 2/√500 is 0.09.
    assert (estimate - exact).norm() / exact.norm() < 0.2
    assert estimate.sum() / exact.sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("curvature", ["gnb", "squared_gradient", "hutchinson"])
def test_a_refresh_is_not_clipped_and_leaves_all_but_h_alone(make_job: Any, curvature: str) -> None:
    """Bit by bit: weights, momentum, step counts, learning rate and DeepSpeed's counters of steps and samples."""
    found = {}
    for stage, clip in itertools.product((0, 1, 2, 3), (0.0, 1e-3)):
        if (stage, curvature) == (3, "hutchinson"):
            continue
        job = make_job(
            f"alone-{stage}", TRAIN.model_copy(update={"zero_stage": stage, "gradient_clipping": clip}),
            optimizer=Soul(type="soul", curvature=curvature, curvature_of="normal"),
            objective=Objective(forget=OBJECTIVE.forget, normal=Nll(type="nll")),
        )  # fmt: skip
        ready, _ = set_up(job, 0, 1, torch.device("cpu"))
        before = all_but_h(ready)
        refresh_curvature(ready, step_of(ready, 0), {"forget": 0.2, "normal": 1.5})
        for a, b in zip(before, all_but_h(ready), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        h = torch.cat([ready.optimizer.state[p]["exp_avg_sq"].flatten() for p in optimizer_parameters(ready.engine)])
        found[stage, clip] = h.double().sum().item()
        ready.engine.destroy()
    first = found[0, 0.0]
    assert abs(first) > 1e-3
    assert all(total == pytest.approx(first, rel=1e-4) for total in found.values())


def all_but_h(ready: Setup) -> list[Any]:
    engine, flat = ready.engine, optimizer_parameters(ready.engine)
    states = [ready.optimizer.state[p] for p in flat]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in ready.optimizer.param_groups]
    return [
        *(p.detach().clone() for p in (*flat, *consolidated_state(engine).values())),
        *(state["exp_avg"].clone() for state in states),
        [state["step"] for state in states],
        [engine.global_steps, engine.global_samples, engine.skipped_steps],
        copy.deepcopy(groups),
    ]
