"""The training loop: the same function in this process, in each Ray Train worker and inside a trial."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.config import Objective
from components.data.streams import StepRows
from components.errors import TrainingError
from components.files import whole_folder
from components.models import check_packing, load_model, load_tokenizer, quiet_libraries, save_model
from components.objectives.terms import TERMS
from components.optimizers.choose import learning_rate, make_optimizer
from components.optimizers.soul import Soul
from components.training.batches import Answers, Batcher, MicroBatch, to_device
from components.training.engine import backward, consolidated_state, hessian_step, optimizer_step, start_engine
from components.training.job import Job, make_plan, open_sets, total_steps
from components.training.reference import Reference


def train_loop(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """Train `job.model` and write the result to `job.output`. torch.distributed must be up, with `world` ranks.

    Returns the number of steps and seconds; the course of training is in `job.metrics`.

    Raises:
        TrainingError: on all ranks alike when a loss is not finite, before any parameter changes.
    """
    quiet_libraries()
    batcher = make_batcher(job, rank, world, device)
    steps = total_steps(job, batcher.plan)
    model = load_model(Path(job.model)).to(device)
    if job.train.packing:
        check_packing(model, Path(job.model))
    optimizer = make_optimizer(job.optimizer, model)
    engine = start_engine(model, optimizer, job.train)
    terms = {name: term for name, term in job.objective if term is not None}
    started = time.perf_counter()

    for step in range(steps):
        step_started = time.perf_counter()
        rows = batcher.plan.step_rows(step)
        counts = batcher.counts(rows)
        if isinstance(optimizer, Soul) and step % job.optimizer.hessian_interval == 0:  # type: ignore[union-attr]
            _refresh_hessian(engine, optimizer, batcher, rows, counts, step, job, device)
        rate = learning_rate(job.optimizer.lr, job.train, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        micro_batches = list(batcher.micro_batches(rows, tuple(terms)))
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            logits = engine(batch.input_ids, batch.positions, batch.position_ids)
            loss, parts = combine(logits, batch, job.objective, counts, batcher.references)
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value
            # DeepSpeed averages gradients over the ranks; the terms are already divided by global counts.
            backward(engine, loss * world, last=k == len(micro_batches) - 1)
        sums["tokens"] = torch.tensor(float(sum(batch.tokens for batch in micro_batches)), device=device)
        totals = _sum_over_ranks(sums)
        _check_finite(totals, step)
        grad_norm = optimizer_step(engine)

        clipping = _clip_fraction(optimizer, device)
        if rank == 0:
            seconds = time.perf_counter() - step_started
            line = {
                "time": time.time(),
                "step": step + 1,
                "steps": steps,
                **{f"train/{name}": value for name, value in totals.items() if name != "tokens"},
                "train/grad_norm": grad_norm,
                "train/lr": rate,
                **clipping,
                "perf/tokens_per_second": totals["tokens"] / seconds,
                "perf/step_seconds": seconds,
            }
            with open(job.metrics, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    seconds = time.perf_counter() - started
    _export(engine, job, rank)
    engine.destroy()
    return {"steps": steps, "seconds": seconds, "world": world}


def make_batcher(job: Job, rank: int, world: int, device: torch.device) -> Batcher:
    """Open the prepared rows that the objective uses."""
    sets = open_sets(job)
    references = {group: Reference(Path(folder), device) for group, folder in job.reference.items()}
    return Batcher(make_plan(job, sets), *sets, references, job.train.micro_batch_size, job.train.packing, rank, world)


def combine(
    logits: Tensor, batch: MicroBatch, objective: Objective, counts: dict[str, int], references: dict[str, Reference]
) -> tuple[Tensor, dict[str, Tensor]]:
    """ε1·L_fgt + ε2·L_rdn + ε3·L_nor of one micro-batch, each term over its global count.

    Returns the loss to differentiate and what to log; both add up to the step's values over micro-batches and ranks.
    """
    loss = logits.sum() * 0  # an empty micro-batch still takes part in every collective
    parts = {"loss": torch.zeros((), device=logits.device)}
    for group, term in objective:
        if term is None:
            continue
        answers = batch.groups[group]
        function, inputs, per = TERMS[term.type]
        settings = term.model_dump(exclude={"type", "weight", "responses"})
        total, metrics = function(**_term_inputs(logits, answers, inputs, references.get(group)), **settings)
        mean = total / counts[group if per == "token" else f"{group}_rows"]
        loss = loss + term.weight * mean
        parts["loss"] = parts["loss"] + (term.weight * mean).detach()
        parts[f"{group}_loss"] = mean.detach()
        parts |= {f"{group}_{name}": value / counts[group] for name, value in metrics.items()}
    return loss, parts


def _term_inputs(
    logits: Tensor, answers: Answers, names: tuple[str, ...], reference: Reference | None
) -> dict[str, Tensor]:
    own = logits[answers.first : answers.first + len(answers.targets)]
    inputs: dict[str, Tensor] = {"logits": own, "mask": answers.mask, "targets": answers.targets}
    if "logp" in names:
        flat = -torch.nn.functional.cross_entropy(own.float(), answers.targets, reduction="none")
        inputs["logp"] = answers.padded(flat)
    if "original_logits" in names:
        assert reference is not None
        assert answers.hidden is not None
        inputs["original_logits"] = reference.logits(answers.hidden)
    if "original_logp" in names:
        assert answers.original_logp is not None
        inputs["original_logp"] = answers.padded(answers.original_logp)
    return {name: inputs[name] for name in names}


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One label per row of `logits` [n, vocabulary] by the inverse CDF at `uniforms` [n]."""
    cdf = torch.softmax(logits.detach().double(), dim=-1).cumsum(-1)
    return (
        torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[:, -1:], right=True)
        .squeeze(-1)
        .clamp_max(cdf.shape[1] - 1)
    )


def _refresh_hessian(
    engine: Any,
    optimizer: Soul,
    batcher: Batcher,
    rows: StepRows,
    counts: dict[str, int],
    step: int,
    job: Job,
    device: torch.device,
) -> None:
    """Gauss-Newton-Bartlett: the gradient of the loss on labels that the model itself draws."""
    source = job.optimizer.curvature_of  # type: ignore[union-attr]
    groups = tuple(g for g in ("forget", "normal") if source in (g, "all") and counts[g])
    tokens = sum(counts[group] for group in groups)
    micro_batches = list(batcher.micro_batches(rows, groups, labels_key=step))
    with hessian_step(engine, optimizer, tokens):
        for k, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            logits = engine(batch.input_ids, batch.positions, batch.position_ids)
            uniforms = torch.cat([batch.groups[group].uniforms for group in groups])  # type: ignore[misc]
            labels = sample_labels(logits, uniforms)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / tokens
            backward(engine, loss * batcher.world, last=k == len(micro_batches) - 1)


def _sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, float]:
    """Every rank has the same names in the same order, so one small all-reduce serves them all."""
    values = torch.stack([value.double() for value in sums.values()])
    torch.distributed.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def _check_finite(totals: dict[str, float], step: int) -> None:
    bad = [name for name, value in totals.items() if not abs(value) < float("inf")]
    if bad:
        raise TrainingError(
            f"Loss is not finite at step {step + 1} ({', '.join(bad)}). No parameter was changed by this step. "
            "Lower optimizer.lr or objective.forget.weight, or set train.gradient_clipping."
        )


def _clip_fraction(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    if not isinstance(optimizer, Soul):
        return {}
    counts = torch.tensor(optimizer.take_clip_counts(), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(counts)
    return {"train/clip_fraction": float(counts[0] / counts[1])}


def _export(engine: Any, job: Job, rank: int) -> None:
    state = consolidated_state(engine)
    if rank == 0 and state is not None:
        with whole_folder(Path(job.output)) as folder:
            save_model(engine.module.model, load_tokenizer(Path(job.model)), folder, state)
    torch.distributed.barrier()
