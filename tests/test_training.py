"""The training loop: against a plain PyTorch loop, and the same on any number of workers and micro-batches."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.config import AdamW, GradientAscent, KlToOriginal, Nll, Objective, RandomResponse, Soul, Train
from components.data.prepare import Prepared
from components.errors import ClusterError, ModelError, TrainingError
from components.models import check_packing, fingerprint, load_model
from components.objectives.terms import kl_to_original
from components.training.batches import Batcher
from components.training.job import Job
from components.training.launch import run_job
from components.training.loop import combine, make_batcher, sample_labels
from components.training.reference import Reference, needs, reference_pass

OBJECTIVE = Objective(
    forget=GradientAscent(type="gradient_ascent", weight=0.2),
    random=RandomResponse(type="random_response", weight=0.7, responses=2),
    normal=KlToOriginal(type="kl_to_original", weight=1.5),
)
SOUL = Soul(type="soul", lr=1e-3, gamma=2.0, eps=1e-6, hessian_interval=3, weight_decay=0.01)
TRAIN = Train(workers=0, zero_stage=3, batch_size=8, micro_batch_size=8, steps=20, gradient_clipping=0.5)


@pytest.fixture(scope="session")
def original(base: Path, streams: dict[str, Prepared], storage: Path) -> Path:
    """The base model after a few steps on the people's facts."""
    output = storage / "original"
    job = Job(
        model=str(base), output=str(output), metrics=str(storage / "original.jsonl"),
        normal=str(streams["normal"].folder), objective=Objective(normal=Nll(type="nll")),
        optimizer=AdamW(type="adamw", lr=3e-3),
        train=Train(workers=0, zero_stage=0, batch_size=16, micro_batch_size=16, steps=60), seed=0,
    )  # fmt: skip
    run_job(job, storage)
    losses = [json.loads(line)["train/normal_loss"] for line in (storage / "original.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    return output


@pytest.fixture
def make_job(original: Path, streams: dict[str, Prepared], storage: Path, tmp_path: Path):
    def make(name: str, train: Train = TRAIN, **changes) -> Job:
        settings = {
            "model": str(original), "output": str(tmp_path / name), "metrics": str(tmp_path / f"{name}.jsonl"),
            "objective": OBJECTIVE, "optimizer": SOUL, "train": train,
            "seed": 5, **{stream: str(prepared.folder) for stream, prepared in streams.items()},
        }  # fmt: skip
        job = Job(**{**settings, **changes})
        here = job.model_copy(update={"train": job.train.model_copy(update={"workers": 0})})
        reference = {
            group: str(reference_pass(here, group, what, fingerprint(original), storage))
            for group, what in needs(job.objective).items()
        }
        return job.model_copy(update={"reference": reference})

    return make


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output) / "model.safetensors")


def run(job: Job, tmp_path: Path) -> dict[str, torch.Tensor]:
    run_job(job, tmp_path)
    return weights(job)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].detach().float() - b[name].detach().float()).abs().max()) for name in a)


def lines(job: Job) -> list[dict]:
    return [json.loads(line) for line in Path(job.metrics).read_text().splitlines()]


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
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for name, p in names.items():
            decay = SOUL.weight_decay if p.ndim >= 2 else 0.0
            m[name] = SOUL.betas[0] * m[name] + (1 - SOUL.betas[0]) * p.grad
            p.data = p.data * (1 - SOUL.lr * decay)
            p.data -= SOUL.lr * (m[name] / (SOUL.gamma * h[name]).clamp(min=SOUL.eps)).clamp(-1, 1)
    return {name: p.detach() for name, p in names.items()}


def one_batch(batcher: Batcher) -> Batcher:
    return batcher._replace(micro_batch_size=1000)


def test_equals_a_plain_loop_with_two_live_models(make_job, tmp_path: Path) -> None:
    job = make_job("ours", TRAIN.model_copy(update={"steps": 8}))
    assert distance(run(job, tmp_path), plain_loop(job, steps=8)) < 1e-5


@pytest.mark.parametrize("change", [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"micro_batch_size": 3}])
def test_zero_stage_and_micro_batches_do_not_change_the_model(make_job, tmp_path: Path, change: dict) -> None:
    assert distance(run(make_job("a"), tmp_path), run(make_job("b", TRAIN.model_copy(update=change)), tmp_path)) < 1e-5


@pytest.mark.usefixtures("ray_cluster")
def test_workers_do_not_change_the_model(make_job, tmp_path: Path) -> None:
    """20 steps in this process, on 1 Ray worker and on 2 under ZeRO-3: the same parameters within 1e-5.

    Of 15 forget rows in batches of 7 the third batch has one row, so that one of two ranks has none.
    """
    split = {"batch_size": 7, "micro_batch_size": 2}
    jobs = [make_job(f"w{n}", TRAIN.model_copy(update={"workers": n, **split})) for n in (0, 1, 2)]
    here, one, two = (run(job, tmp_path) for job in jobs)
    assert distance(here, one) < 1e-5
    assert distance(here, two) < 1e-5
    assert distance(here, load_file(Path(jobs[0].model) / "model.safetensors")) > 1e-3  # it did move
    logged = [lines(job) for job in jobs]
    for step in range(20):
        for key in ("train/loss", "train/forget_loss", "train/random_loss", "train/normal_loss", "train/grad_norm"):
            assert logged[2][step][key] == pytest.approx(logged[0][step][key], rel=1e-3, abs=1e-4), (step, key)
    assert not list(tmp_path.glob("ray-train-*"))


def test_adamw_equals_torchs_own(make_job, tmp_path: Path, base: Path) -> None:
    optimizer = AdamW(type="adamw", lr=1e-3, weight_decay=0.1)
    job = make_job("adamw", optimizer=optimizer, objective=Objective(normal=Nll(type="nll")), forget=None, random=None)
    ours = run(job, tmp_path)
    model = load_model(Path(job.model))
    batcher = make_batcher(job, 0, 1, torch.device("cpu"))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(20):
        rows = batcher.plan.step_rows(step)
        [batch] = batcher.micro_batches(rows, ("normal",))
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
        plain.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch.groups["normal"].targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
    assert distance(ours, dict(model.named_parameters())) < 1e-5


def test_forgetting_goes_the_right_way(make_job, tmp_path: Path) -> None:
    job = make_job("way", TRAIN.model_copy(update={"steps": 40}))
    run_job(job, tmp_path)
    first, last = lines(job)[0], lines(job)[-1]
    assert first["train/normal_loss"] == pytest.approx(0, abs=1e-6)  # KL to itself
    assert last["train/forget_loss"] < first["train/forget_loss"] - 0.1  # log-probability of forget answers fell
    assert last["train/random_loss"] < first["train/random_loss"]
    assert last["train/normal_loss"] < 1.0
    assert all(0 <= line["train/clip_fraction"] <= 1 for line in lines(job))


@pytest.mark.parametrize(
    ("term", "at_the_original"),
    [
        ({"type": "bounded_ascent", "bound": 3.0, "weight": 1.0}, None),
        ({"type": "npo", "beta": 0.2}, 2 / 0.2 * math.log(2)),  # nothing forgotten yet: the ratio is 1 for every row
        ({"type": "simnpo"}, None),
        ({"type": "wga"}, None),
        ({"type": "satimp", "beta1": 1.0, "weight": 3.0}, None),  # at its own β1 = 5 only what is known by heart counts
        ({"type": "ce_u"}, None),
        ({"type": "undial"}, None),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_every_forget_term_forgets_however_the_batch_is_split(
    make_job, tmp_path: Path, term: dict, at_the_original: float | None
) -> None:
    normal = {"npo": "reverse_kl", "simnpo": "jensen_shannon"}.get(term["type"], "nll")
    objective = Objective.model_validate({"forget": term, "normal": {"type": normal}})
    whole, split = (
        make_job(
            f"micro{size}",
            TRAIN.model_copy(update={"micro_batch_size": size, "steps": 8}),
            objective=objective,
            random=None,
        )
        for size in (8, 3)
    )
    assert distance(run(whole, tmp_path), run(split, tmp_path)) < 1e-5
    first, last = lines(whole)[0], lines(whole)[-1]
    assert last["train/forget_token_probability"] < first["train/forget_token_probability"]
    if at_the_original is not None:
        assert first["train/forget_loss"] == pytest.approx(at_the_original, rel=1e-6)
    if normal != "nll":
        assert first["train/normal_loss"] == pytest.approx(0, abs=1e-6)


def test_a_term_left_out_is_not_computed(make_job, tmp_path: Path) -> None:
    job = make_job(
        "ascent", TRAIN.model_copy(update={"steps": 2}), objective=Objective(forget=OBJECTIVE.forget), random=None,
        normal=None, optimizer=AdamW(type="adamw"),
    )  # fmt: skip
    run_job(job, tmp_path)
    assert {key for key in lines(job)[0] if key.endswith("_loss")} == {"train/forget_loss"}


def test_bf16_keeps_fp32_masters(make_job, tmp_path: Path) -> None:
    """An update far below bf16's resolution still adds up."""
    train = TRAIN.model_copy(update={"dtype": "bf16", "steps": 30, "gradient_clipping": 0.0})
    objective = Objective(forget=OBJECTIVE.forget, random=OBJECTIVE.random)
    optimizer = AdamW(type="adamw", lr=2e-5)
    job = make_job("bf16", train, objective=objective, optimizer=optimizer, normal=None)
    moved = run(job, tmp_path)
    start = load_file(Path(job.model) / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in moved.values())
    share = np.mean([(moved[n] != start[n].bfloat16()).float().mean().item() for n in moved if moved[n].ndim >= 2])
    assert share > 0.3


def test_a_loss_that_is_not_finite_stops_before_any_update(make_job, tmp_path: Path) -> None:
    overflowing = GradientAscent(type="gradient_ascent", weight=3e38)
    job = make_job("inf", objective=OBJECTIVE.model_copy(update={"forget": overflowing}))
    with pytest.raises(TrainingError, match=r"Loss is not finite at step 1 \(loss\)"):
        run_job(job, tmp_path)
    assert not Path(job.output).exists()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_stops_before_any_update(
    make_job, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient (that of a square root at 0) is not."""

    def poisoned(logits, *rest):
        loss, parts = combine(logits, *rest)
        return loss + torch.sqrt(logits.sum() * 0), parts

    monkeypatch.setattr("components.training.loop.combine", poisoned)
    with pytest.raises(TrainingError, match="Gradient is not finite"):
        run_job(make_job("nan", TRAIN.model_copy(update={"zero_stage": stage})), tmp_path)
    assert not (tmp_path / "nan").exists()


def test_bf16_trains_with_curvature_and_kl(make_job, tmp_path: Path) -> None:
    job = make_job("bf16", TRAIN.model_copy(update={"dtype": "bf16", "steps": 6}))
    run_job(job, tmp_path)
    assert lines(job)[0]["train/normal_loss"] == pytest.approx(0, abs=1e-2)
    assert all(np.isfinite(line["train/loss"]) for line in lines(job))


def test_a_damaged_model_is_refused(make_job, original: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(original, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        run_job(make_job("nan", model=str(damaged)), tmp_path)


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has_are_refused_at_once(make_job, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"CPUs needed=64, CPUs there=4"):
        run_job(make_job("many", TRAIN.model_copy(update={"workers": 64})), tmp_path)


def answer_logits(net, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
    return net(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def test_cached_reference_gives_the_live_kl(original: Path, base: Path, make_job) -> None:
    """The KL to the cached original equals that of two live models within 1e-6, on every row."""
    batcher = make_batcher(make_job("kl"), 0, 1, torch.device("cpu"))
    reference = batcher.references["normal"]
    frozen, other = load_model(original), load_model(base)
    with torch.no_grad():
        for i in range(len(batcher.normal)):
            prompt, answer = batcher.normal.prompt(i), batcher.normal.answer(i)
            ours = answer_logits(other, prompt, answer)
            cached, _ = kl_to_original(ours, reference.logits(reference.hidden(i)))
            live, _ = kl_to_original(ours, answer_logits(frozen, prompt, answer))
            assert abs(float(cached - live)) / len(answer) < 1e-6


def test_cached_log_probabilities_are_the_live_ones(original: Path, make_job, storage: Path) -> None:
    job = make_job("logp")
    batcher = make_batcher(job, 0, 1, torch.device("cpu"))
    found = {g: Reference(reference_pass(job, g, "logp", fingerprint(original), storage)) for g in ("forget", "random")}
    frozen = load_model(original)

    def live(prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
        logp = torch.log_softmax(answer_logits(frozen, prompt, answer), -1)
        return logp[torch.arange(len(answer)), torch.from_numpy(answer.astype(np.int64))]

    with torch.no_grad():
        for step in (0, 7, 19):
            rows = batcher.plan.step_rows(step)
            for j, i in enumerate(rows.forget):
                prompt = batcher.forget.prompt(i)
                expected = live(prompt, batcher.forget.answer(i))
                torch.testing.assert_close(found["forget"].logp(i), expected, rtol=0, atol=1e-6)
                for k, drawn in enumerate(rows.random[j]):
                    expected = live(prompt, batcher.pool.answer(drawn))
                    key = int(rows.counter[j]) * 2 + k
                    torch.testing.assert_close(found["random"].logp(key), expected, rtol=0, atol=1e-6)
            given = batcher._replace(references=found)
            for batch in given.micro_batches(rows, ("forget", "random")):
                for group in ("forget", "random"):
                    assert batch.groups[group].original_logp.shape == batch.groups[group].targets.shape


def test_only_rows_that_the_steps_use_pass_through_the_original(original: Path, make_job, storage: Path) -> None:
    short, whole = (make_job("few", TRAIN.model_copy(update={"steps": steps})) for steps in (2, 20))
    reference = Reference(Path(short.reference["normal"]))
    batcher = make_batcher(short, 0, 1, torch.device("cpu"))
    used = np.concatenate([batcher.plan.step_rows(step).normal for step in range(2)])
    for i in range(len(batcher.normal)):
        if i in used:
            assert len(reference.hidden(i)) == batcher.normal.lengths(i)[1]
        else:
            with pytest.raises(IndexError):
                reference.hidden(i)
    assert short.reference != whole.reference


@pytest.mark.usefixtures("ray_cluster")
def test_reference_pass_on_workers_gives_the_same(original: Path, make_job, tmp_path: Path) -> None:
    """Also when the workers take all CPUs there are."""
    job = make_job("many", TRAIN.model_copy(update={"workers": 2, "cpus_per_worker": 2}))
    here, there = job.reference["normal"], reference_pass(job, "normal", "hidden", fingerprint(original), tmp_path)
    keys = np.load(there / "keys.npy")
    for key in keys:
        a, b = (Reference(Path(folder)).hidden(int(key)) for folder in (here, there))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_packing_changes_nothing(make_job, tmp_path: Path) -> None:
    """Sequences that share a row must not see each other: with curvature, KL and several micro-batches."""
    train = TRAIN.model_copy(update={"steps": 6, "micro_batch_size": 3})
    apart = run(make_job("apart", train), tmp_path)
    together = run(make_job("together", train.model_copy(update={"packing": True})), tmp_path)
    assert distance(apart, together) < 1e-5


def test_a_model_that_mixes_packed_sequences_is_refused(original: Path) -> None:
    class Leaking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = load_model(original)

        def base_model(self, input_ids, use_cache, position_ids=None):  # forgets where the sequences begin
            return self.inner.base_model(input_ids=input_ids, use_cache=use_cache)

    check_packing(load_model(original), original)
    with pytest.raises(ModelError, match="mixes sequences that share a row"):
        check_packing(Leaking(), original)


def test_sampled_labels_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(20_000, 1)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    shares = torch.bincount(sample_labels(logits, uniforms), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.012)
    edges = sample_labels(logits[:2], torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [0, 3]


def test_exported_folder_is_a_plain_hugging_face_model(make_job, tmp_path: Path) -> None:
    job = make_job("export", TRAIN.model_copy(update={"steps": 2}))
    run_job(job, tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; import sys, torch\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'components' not in sys.modules and m.dtype == torch.float32\n"
        "ids = t('Question: Where?\\nAnswer:', return_tensors='pt').input_ids\n"
        "print(m(ids).logits[0, -1, :5].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, job.output], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [file.name for file in Path(job.output).iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
