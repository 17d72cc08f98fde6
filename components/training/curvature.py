"""Estimates of the Hessian's diagonal, brought to the optimizer through DeepSpeed's own reduction of gradients."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.config import Influence, Soul
from components.data.streams import draw
from components.training.batches import MicroBatch, to_device
from components.training.engine import Outputs, backward, visit_gradients
from components.training.losses import combined
from components.training.passes import Setup, Step, accumulate

_ROWS = 256  # whose distribution is in memory in float64 at a time


def refresh_curvature(setup: Setup, step: Step, weights: dict[str, float]) -> None:
    """Renew the optimizer's h at the present parameters; these, the momentum and the schedule stay as they are.

    gnb: ĥ = B·ĝ⊙ĝ with ĝ the gradient of the mean loss over B labels that the model draws itself: its expectation
    is the diagonal of the Gauss-Newton matrix of the mean loss (2305.14342, algorithm 2).
    squared_gradient: the same with the gradient of the objective's own terms.
    hutchinson: ĥ = u⊙(Hu) with signs u, of the objective's own terms (2305.14342, algorithm 1).
    """
    config, optimizer = setup.job.optimizer, setup.optimizer
    assert isinstance(config, Soul | Influence)
    kind = config.curvature if isinstance(config, Soul) else "gnb"
    factor = config.batch_factor if isinstance(config, Soul) else None
    objective = setup.job.objective
    what = f"the curvature at step {step.number + 1}"
    present = objective.groups() if config.curvature_of == "all" else (config.curvature_of,)
    if kind == "gnb":
        tokens = sum(step.counts[group] for group in present)
        with visit_gradients(setup.engine, lambda p: optimizer.refresh_with_square(p, factor or tokens), what):  # type: ignore[attr-defined]
            accumulate(setup, step, present, _loss_on_own_labels(tokens), "curvature", labels_key=step.number)
        return
    # A group by itself has weight 1: a weight that changes would change h without any change of curvature.
    chosen: dict[str, float] = weights if config.curvature_of == "all" else {config.curvature_of: 1.0}
    of_terms, groups = combined(setup, step, chosen), objective.groups(chosen)

    def loss(outputs: Outputs, batch: MicroBatch) -> Tensor:
        return of_terms(outputs, batch)[0]

    if kind == "hutchinson":
        with visit_gradients(setup.engine, optimizer.refresh, what):  # type: ignore[attr-defined]
            _hessian_along_signs(setup, step, groups, loss)
        return
    tokens = sum(step.counts[group] for group in chosen)
    with visit_gradients(setup.engine, lambda p: optimizer.refresh_with_square(p, factor or tokens), what):  # type: ignore[attr-defined]
        accumulate(setup, step, groups, loss, "curvature")


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One label per row of `logits` [n, vocabulary] by the inverse CDF at `uniforms` [n]."""
    labels = []
    for part, numbers in zip(logits.detach().split(_ROWS), uniforms.split(_ROWS), strict=True):
        cdf = torch.softmax(part.double(), dim=-1).cumsum(-1)
        found = torch.searchsorted(cdf, numbers.unsqueeze(-1) * cdf[:, -1:], right=True).squeeze(-1)
        labels.append(found.clamp_max(cdf.shape[1] - 1))
    return torch.cat(labels)


def _loss_on_own_labels(tokens: int) -> Callable[[Outputs, MicroBatch], Tensor]:
    def loss(outputs: Outputs, batch: MicroBatch) -> Tensor:
        assert outputs.logits is not None
        uniforms = torch.cat([answers.uniforms for answers in batch.groups.values()])  # type: ignore[misc]
        labels = sample_labels(outputs.logits, uniforms)
        return torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum") / tokens

    return loss


def _hessian_along_signs(
    setup: Setup, step: Step, groups: tuple[str, ...], loss: Callable[[Outputs, MicroBatch], Tensor]
) -> None:
    """Leave u⊙(Hu) in the engine in place of a gradient, with the same signs u on all ranks.

    DeepSpeed's hooks would take the first derivatives for a finished backward pass, so they see the module's outputs
    only in a last, empty forward, whose loss has the wanted numbers as its gradient. H is linear in the loss: micro-
    batches and ranks add up.
    """
    module = setup.engine.module
    trained = [p for p in module.parameters() if p.requires_grad]
    signs = [_signs(setup.job.seed, step.number, i, p) for i, p in enumerate(trained)]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention cannot be differentiated twice
        for batch in setup.batcher.micro_batches(step.rows, groups):
            here = to_device(batch, setup.device)
            value = loss(module(here.input_ids, here.positions, here.position_ids), here)
            first = torch.autograd.grad(value, trained, create_graph=True, allow_unused=True)
            product = value * 0  # depends on the parameters also where no first derivative does
            for g, u in zip(first, signs, strict=True):
                product = product + (0 if g is None else (g * u).sum())
            second = torch.autograd.grad(product, trained, allow_unused=True)
            for total, g, u in zip(sums, second, signs, strict=True):
                if g is not None:
                    total.add_(g * u)
    nowhere = torch.zeros(0, dtype=torch.long, device=setup.device)
    outputs = setup.engine(torch.zeros(1, 2, dtype=torch.long, device=setup.device), nowhere)
    linear = torch.stack([(p.float() * total).sum() for p, total in zip(trained, sums, strict=True)]).sum()
    backward(setup.engine, (outputs.nothing() + linear) * setup.batcher.world, last=True)


def _signs(seed: int, step: int, number: int, p: Tensor) -> Tensor:
    signs = 2 * draw(seed, f"signs-{number}", step).integers(2, size=tuple(p.shape), dtype="int8") - 1
    return torch.from_numpy(signs).to(p.device, p.dtype)
