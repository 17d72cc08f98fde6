"""The training loop: against a plain PyTorch loop, and the same on any number of workers and micro-batches."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.config import AdamW, GradientAscent, Nll, Objective
from components.errors import ClusterError, ModelError, TrainingError
from components.models import check_packing, fingerprint, load_model
from components.objectives.keep import kl_to_original
from components.training.curvature import sample_labels
from components.training.launch import run_job
from components.training.loop import make_batcher
from components.training.losses import combine
from components.training.reference import Reference, reference_pass
from tests.training import OBJECTIVE, TRAIN, answer_logits, distance, lines, plain_loop, run


def test_equals_a_plain_loop_with_two_live_models(make_job, tmp_path: Path) -> None:
    job = make_job("ours", TRAIN.model_copy(update={"steps": 8}))
    assert distance(run(job, tmp_path), plain_loop(job, steps=8)) < 1e-5


@pytest.mark.parametrize("change", [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"micro_batch_size": 3}])
def test_zero_stage_and_micro_batches_do_not_change_the_model(make_job, tmp_path: Path, change: dict) -> None:
    assert distance(run(make_job("a"), tmp_path), run(make_job("b", TRAIN.model_copy(update=change)), tmp_path)) < 1e-5


@pytest.mark.slow
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
        ({"type": "max_entropy"}, None),
        ({"type": "logit_flattening"}, None),
        ({"type": "dpo"}, 2 / 0.1 * math.log(2)),
        ({"type": "custom", "import_path": "tests.custom_terms.ascent", "settings": {"scale": 2.0}}, None),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_every_forget_term_forgets_however_the_batch_is_split(
    make_job, tmp_path: Path, term: dict, at_the_original: float | None
) -> None:
    normal = {"npo": "reverse_kl", "simnpo": "jensen_shannon"}.get(term["type"], "nll")
    drawn = {} if term["type"] == "dpo" else {"random": None}
    objective = Objective.model_validate({"forget": term, "normal": {"type": normal}})
    whole, split = (
        make_job(
            f"micro{size}",
            TRAIN.model_copy(update={"micro_batch_size": size, "steps": 8}),
            objective=objective,
            **drawn,
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
    with pytest.raises(TrainingError, match=r"Loss is not finite at step 1 \(loss; on rank 0\)"):
        run_job(job, tmp_path)
    assert not Path(job.output).exists()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_stops_before_any_update(
    make_job, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient (that of a square root at 0) is not."""

    def poisoned(outputs, *rest):
        loss, parts = combine(outputs, *rest)
        return loss + torch.sqrt(outputs.logits.sum() * 0), parts

    monkeypatch.setattr("components.training.losses.combine", poisoned)
    with pytest.raises(TrainingError, match="Gradient of the objective at step 1 is not finite"):
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


def test_cached_reference_gives_the_live_kl(original: Path, base: Path, make_job) -> None:
    """The KL to the cached original equals that of two live models within 1e-6, on every row."""
    batcher = make_batcher(make_job("kl"), 0, 1, torch.device("cpu"))
    reference = batcher.references["normal"]
    frozen, other = load_model(original), load_model(base)
    with torch.no_grad():
        for i in range(len(batcher.normal)):
            prompt, answer = batcher.normal.prompt(i), batcher.normal.answer(i)
            ours = answer_logits(other, prompt, answer)
            cached, _ = kl_to_original(ours, reference.logits(reference.states(i)))
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
            assert len(reference.states(i)) == batcher.normal.lengths(i)[1]
        else:
            with pytest.raises(IndexError):
                reference.states(i)
    assert short.reference != whole.reference


@pytest.mark.usefixtures("ray_cluster")
def test_reference_pass_on_workers_gives_the_same(original: Path, make_job, tmp_path: Path) -> None:
    """Also when the workers take all CPUs there are."""
    job = make_job("many", TRAIN.model_copy(update={"workers": 2, "cpus_per_worker": 2}))
    here, there = job.reference["normal"], reference_pass(job, "normal", "hidden", fingerprint(original), tmp_path)
    keys = np.load(there / "keys.npy")
    for key in keys:
        a, b = (Reference(Path(folder)).states(int(key)) for folder in (here, there))
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
