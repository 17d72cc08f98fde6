"""SOUL under DeepSpeed against the same training written plainly in one process, in fp32 and in bf16."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import Objective, Soul
from components.errors import TrainingError
from components.models import load_model
from components.objectives import terms
from components.training.batches import Batcher
from components.training.curvature import sample_labels
from components.training.job import Job
from components.training.loop import make_batcher, train_loop
from tests.training import TRAIN, distance, join, leave, plain_loop, run, weights

STEPS = 10
STAGES, ACCUMULATION, CLIPPING = (0, 1, 2, 3), (1, 2), (0.0, 0.5)
TOLERANCE = 5e-6


def job_of(make_job: Any, stage: int, ranks: int, accumulation: int, clip: float) -> Job:
    """A job whose step of 8 rows is split over `ranks` and `accumulation` micro-batches."""
    train = TRAIN.model_copy(
        update={
            "zero_stage": stage, "micro_batch_size": 8 // (ranks * accumulation), "steps": STEPS,
            "gradient_clipping": clip,
        }
    )  # fmt: skip
    return make_job(f"z{stage}-r{ranks}-a{accumulation}-c{clip}", train)


@pytest.mark.slow
@pytest.mark.long
def test_soul_equals_a_plain_loop_on_one_rank(make_job: Any, tmp_path: Path) -> None:
    """10 steps with a refresh every 3: ZeRO 0 to 3, accumulation 1 and 2, clipping off and on."""
    for clip in CLIPPING:
        plain = plain_loop(job_of(make_job, 0, 1, 1, clip), STEPS)
        for stage, accumulation in itertools.product(STAGES, ACCUMULATION):
            ours = run(job_of(make_job, stage, 1, accumulation, clip), tmp_path)
            assert distance(ours, plain) < TOLERANCE, (stage, accumulation, clip)


@pytest.mark.slow
def test_soul_equals_a_plain_loop_on_two_ranks(make_job: Any, tmp_path: Path) -> None:
    """The same with two real processes."""
    cases = list(itertools.product(STAGES, ACCUMULATION, CLIPPING))
    jobs = [job_of(make_job, stage, 2, accumulation, clip) for stage, accumulation, clip in cases]
    (tmp_path / "jobs").write_bytes(pickle.dumps([job.model_dump(mode="json") for job in jobs]))
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    plain = {clip: plain_loop(job_of(make_job, 0, 1, 1, clip), STEPS) for clip in CLIPPING}
    for job, (stage, accumulation, clip) in zip(jobs, cases, strict=True):
        assert distance(weights(job), plain[clip]) < TOLERANCE, (stage, accumulation, clip)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_any_update(make_job: Any, tmp_path: Path) -> None:
    """The error names term, step and rank on both."""
    job = make_job("nan", TRAIN.model_copy(update={"micro_batch_size": 4, "steps": 3}))
    (tmp_path / "jobs").write_bytes(pickle.dumps([job.model_dump(mode="json")]))
    torch.multiprocessing.spawn(one_of_two_poisoned, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        told = (tmp_path / f"error-{rank}").read_text()
        assert "Loss is not finite at step 2 (loss, forget_loss, forget_token_probability; on rank 1)" in told
    assert not Path(job.output).exists()
    assert len(Path(job.metrics).read_text().splitlines()) == 1


def one_of_two_poisoned(rank: int, folder: str) -> None:
    join(rank, folder)
    calls = 0
    original = terms.TERMS["gradient_ascent"].function

    def poisoned(logp: torch.Tensor, mask: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        return original(logp * float("nan") if rank == 1 and calls == 2 else logp, mask)

    terms.TERMS["gradient_ascent"] = terms.TERMS["gradient_ascent"]._replace(function=poisoned)
    [job] = pickle.loads(Path(folder, "jobs").read_bytes())
    with pytest.raises(TrainingError) as caught:
        train_loop(Job.model_validate(job), rank, 2, torch.device("cpu"))
    Path(folder, f"error-{rank}").write_text(str(caught.value))
    leave()


def one_of_two(rank: int, folder: str) -> None:
    join(rank, folder)
    for job in pickle.loads(Path(folder, "jobs").read_bytes()):
        train_loop(Job.model_validate(job), rank, 2, torch.device("cpu"))
    leave()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_bit_equal_to_fp32_masters_written_by_hand(make_job: Any, tmp_path: Path, stage: int) -> None:
    """bf16 weights and gradients, two micro-batches accumulated in fp32, masters and curvature in fp32."""
    train = TRAIN.model_copy(
        update={"dtype": "bf16", "zero_stage": stage, "steps": 7, "micro_batch_size": 4, "gradient_clipping": 0.0}
    )
    job = make_job(f"bf16-{stage}", train, objective=Objective(forget=make_job("x").objective.forget,
                   random=make_job("x").objective.random), optimizer=FORGET_CURVATURE, normal=None)  # fmt: skip
    ours, by_hand = run(job, tmp_path), masters_loop(job)
    assert ours.keys() == by_hand.keys()
    assert all(torch.equal(ours[name], by_hand[name]) for name in ours)


FORGET_CURVATURE = Soul(
    type="soul", lr=1e-3, gamma=2.0, eps=1e-6, hessian_interval=3, curvature_of="forget", weight_decay=0.01
)


def masters_loop(job: Job) -> dict[str, torch.Tensor]:
    model = load_model(Path(job.model)).bfloat16()
    # what DeepSpeed leaves in fp32: buffers
    for name, buffer in load_model(Path(job.model)).named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    batcher: Batcher = make_batcher(job, 0, 1, torch.device("cpu"))
    names = dict(model.named_parameters())
    master = {name: p.detach().float() for name, p in names.items()}
    m, h = ({name: torch.zeros_like(p) for name, p in master.items()} for _ in range(2))
    beta1, beta2 = FORGET_CURVATURE.betas

    def logits_of(batch: Any) -> torch.Tensor:
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden.flatten(0, 1)[batch.positions])

    def gradients(batches: Any, loss: Any) -> dict[str, torch.Tensor]:
        sums = {name: torch.zeros_like(p) for name, p in master.items()}
        for batch in batches:
            model.zero_grad()
            loss(batch, logits_of(batch)).backward()
            for name, p in names.items():
                sums[name] += p.grad.float()
        return sums

    for step in range(job.train.steps or 0):
        rows = batcher.plan.step_rows(step)
        counts = batcher.counts(rows)
        if step % 3 == 0:

            def own_labels(batch: Any, logits: torch.Tensor, n: int = counts["forget"]) -> torch.Tensor:
                labels = sample_labels(logits, batch.groups["forget"].uniforms)
                return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / n

            for name, g in gradients(batcher.micro_batches(rows, ("forget",), labels_key=step), own_labels).items():
                h[name].mul_(beta2).addcmul_(g, g, value=(1 - beta2) * counts["forget"])

        def objective(batch: Any, logits: torch.Tensor, counts: dict[str, int] = counts) -> torch.Tensor:
            total = torch.zeros(())
            for group, weight in (("forget", -0.2), ("random", 0.7)):
                answers = batch.groups[group]
                own = logits[answers.first : answers.first + len(answers.targets)].float()
                ce = torch.nn.functional.cross_entropy(own, answers.targets, reduction="none")
                total = total + weight * ((answers.padded(ce) * answers.mask).sum() / counts[group])
            return total

        for name, g in gradients(batcher.micro_batches(rows, ("forget", "random")), objective).items():
            decay = FORGET_CURVATURE.weight_decay if g.ndim >= 2 else 0.0
            if decay:
                master[name].mul_(1 - FORGET_CURVATURE.lr * decay)
            m[name].mul_(beta1).add_(g, alpha=1 - beta1)
            direction = m[name] / (FORGET_CURVATURE.gamma * h[name]).clamp_min(FORGET_CURVATURE.eps)
            master[name].add_(direction.clamp(-1, 1), alpha=-FORGET_CURVATURE.lr)
            names[name].data.copy_(master[name].bfloat16())
    return {name: p.detach() for name, p in names.items()}
