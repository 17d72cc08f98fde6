"""What tests of training share: settings, reading results, and the same training written plainly."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from components.config import GradientAscent, KlToOriginal, Objective, RandomResponse, Soul, Train
from components.files import read_lines
from components.models import load_model
from components.training.batches import Batcher
from components.training.checkpoint_files import Place, manifest, steps_kept
from components.training.curvature import sample_labels
from components.training.job import Job
from components.training.launch import run_job
from components.training.loop import make_batcher

OBJECTIVE = Objective(
    forget=GradientAscent(type="gradient_ascent", weight=0.2),
    random=RandomResponse(type="random_response", weight=0.7, responses=2),
    normal=KlToOriginal(type="kl_to_original", weight=1.5),
)
SOUL = Soul(type="soul", lr=1e-3, gamma=2.0, eps=1e-6, hessian_interval=3, weight_decay=0.01)
TRAIN = Train(workers=0, zero_stage=3, batch_size=8, micro_batch_size=8, steps=20, gradient_clipping=0.5)


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output) / "model.safetensors")


def run(job: Job, tmp_path: Path) -> dict[str, torch.Tensor]:
    run_job(job, tmp_path)
    return weights(job)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].detach().float() - b[name].detach().float()).abs().max()) for name in a)


def lines(job: Job) -> list[dict]:
    return read_lines(Path(job.metrics))


def events(job: Job) -> list[dict]:
    return read_lines(Path(job.events or ""))


def steps_done(where: str | Path) -> int:
    """Lines of a metrics file, or of those of all runs in a storage folder."""
    where = Path(where)
    files = where.glob("gradient-ascent*/metrics.jsonl") if where.is_dir() else [where]
    return sum(len(read_lines(file)) for file in files)


def saved(job: Job, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by default the newest: weights, optimizer state and masks of all ranks."""
    place = Place(job.checkpoints or "")
    step = steps_kept(place)[0] if step is None else step
    found: dict[str, torch.Tensor] = {}
    for name in manifest(place, step)["files"]:
        if name.endswith(".safetensors"):
            found |= load_file(place.path(step, name))
    return found


def plain_loop(job: Job, steps: int) -> dict[str, torch.Tensor]:
    """The same training written row by row with Hugging Face's own forward pass and two live models."""
    model, frozen = load_model(Path(job.model)), load_model(Path(job.model))
    batcher = make_batcher(job, 0, 1, torch.device("cpu"))
    names = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in names.items()}
    h = {name: torch.zeros_like(p) for name, p in names.items()}

    def nll(net, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
        targets = torch.from_numpy(answer.astype(np.int64))
        return torch.nn.functional.cross_entropy(answer_logits(net, prompt, answer), targets, reduction="sum")

    for step in range(steps):
        rows = batcher.plan.step_rows(step)
        counts = batcher.counts(rows)
        forget, normal, pool = batcher.forget, batcher.normal, batcher.pool
        if step % SOUL.hessian_interval == 0:
            uniforms = next(iter(one_batch(batcher).micro_batches(rows, ("normal",), labels_key=step)))
            shared = rows.normal[batcher.share(rows)]
            split = uniforms.groups["normal"].uniforms.split([normal.lengths(i)[1] for i in shared])
            total = 0.0
            for i, u in zip(shared, split, strict=True):
                logits = answer_logits(model, normal.prompt(i), normal.answer(i))
                total = total + torch.nn.functional.cross_entropy(logits, sample_labels(logits, u), reduction="sum")
            model.zero_grad()
            (total / counts["normal"]).backward()
            for name, p in names.items():
                h[name] = SOUL.betas[1] * h[name] + (1 - SOUL.betas[1]) * counts["normal"] * p.grad**2
        loss = 0.0
        for j, i in enumerate(rows.forget):
            loss = loss - 0.2 * nll(model, forget.prompt(i), forget.answer(i)) / counts["forget"]
            for k in rows.random[j]:
                loss = loss + 0.7 * nll(model, forget.prompt(i), pool.answer(k)) / counts["random"]
        for i in rows.normal:
            p, q = (answer_logits(net, normal.prompt(i), normal.answer(i)) for net in (model, frozen))
            kl = torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=q.detach()), torch.distributions.Categorical(logits=p)
            )
            loss = loss + 1.5 * kl.sum() / counts["normal"]
        model.zero_grad()
        loss.backward()
        if job.train.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.gradient_clipping)
        for name, p in names.items():
            decay = SOUL.weight_decay if p.ndim >= 2 else 0.0
            m[name] = SOUL.betas[0] * m[name] + (1 - SOUL.betas[0]) * p.grad
            p.data = p.data * (1 - SOUL.lr * decay)
            p.data -= SOUL.lr * (m[name] / (SOUL.gamma * h[name]).clamp(min=SOUL.eps)).clamp(-1, 1)
    return {name: p.detach() for name, p in names.items()}


def one_batch(batcher: Batcher) -> Batcher:
    return batcher._replace(micro_batch_size=1000)


def answer_logits(net, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
    return net(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def join(rank: int, folder: str, ranks: int = 2) -> None:
    """Make this process one of `ranks`, of one thread each, that meet in `folder`."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def leave() -> None:
    """End such a process, as Ray ends its workers: now and then an interpreter that ends by itself with gloo's threads
    in it aborts."""
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def plain_gradient(job: Job, group: str, sign: float) -> dict[str, torch.Tensor]:
    """Of `sign` times the mean next-token loss on the group's rows of step 1, by plain autograd."""
    model, batcher = load_model(Path(job.model)), make_batcher(job, 0, 1, torch.device("cpu"))
    rows, own = batcher.plan.step_rows(0), getattr(batcher, group)
    for i in getattr(rows, group):
        targets = torch.from_numpy(own.answer(i).astype(np.int64))
        logits = answer_logits(model, own.prompt(i), own.answer(i))
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (sign * loss / batcher.counts(rows)[group]).backward()
    return {name: p.grad for name, p in model.named_parameters()}
