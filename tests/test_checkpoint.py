"""Checkpoints: a run that was stopped and gone on with is bit for bit the run that was not."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from components.config import Best, Guard, Lora, Objective, Optimizer, Probe, Wagle
from components.errors import ConfigError, Stopped, StorageError, TrainingError
from components.models import load_model
from components.training import checkpoint_files, loop
from components.training import step as module
from components.training.checkpoint_files import DAMAGED, MANIFEST, Place, manifest, steps_kept
from components.training.guards import probe_rows
from components.training.job import Job
from components.training.launch import run_job
from tests import custom_terms
from tests.drive import on_two_ranks
from tests.training import SOUL, TRAIN, answer_logits, distance, events, lines, run, saved, weights

DUAL = {"type": "dual", "bound": 0.2, "rate": 3.0, "start": 1.0}
GRAD_DIFF = {"forget": {"type": "gradient_ascent", "weight": 0.3}, "normal": {"type": "nll"}}
SOUL4 = {**SOUL.model_dump(), "hessian_interval": 4}

CASES: dict[str, dict[str, Any]] = {
    "soul-zero0": {"train": {"zero_stage": 0}},
    "soul-zero1": {"train": {"zero_stage": 1}},
    "soul-zero2": {"train": {"zero_stage": 2, "micro_batch_size": 3}},
    "soul-zero3": {"train": {"zero_stage": 3, "micro_batch_size": 3}},
    "soul-bf16-zero1": {"train": {"zero_stage": 1, "dtype": "bf16"}},
    "soul-bf16-zero3": {"train": {"zero_stage": 3, "dtype": "bf16", "micro_batch_size": 3}},
    "adaptive": {"optimizer": {**SOUL4, "adaptive": {"low": 0.0, "high": 0.2, "soonest": 2}}},
    "adamw": {"optimizer": {"type": "adamw", "lr": 1e-3, "weight_decay": 0.1}, "train": {"schedule": "cosine"}},
    "lion": {"optimizer": {"type": "lion", "lr": 1e-3}, "train": {"zero_stage": 2}},
    "sgd-offload": {"optimizer": {"type": "sgd", "lr": 0.1}, "train": {"offload": "optimizer"}},
    "adafactor": {"optimizer": {"type": "adafactor", "lr": 1e-3}, "train": {"zero_stage": 0}},
    "influence": {"optimizer": {"type": "influence"}, "train": {"gradient_clipping": 0.0}},
    "dual": {"objective": {**GRAD_DIFF, "normal": {"type": "nll", "weight": DUAL}}},
    "mask": {"mask": {"type": "wagle", "keep": 0.6, "batches": 1},
             "optimizer": {"type": "adamw", "lr": 1e-3, "weight_decay": 0.1}},
    "lora": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
}  # fmt: skip


def job_of(make_job: Any, name: str, case: dict[str, Any], **more: Any) -> Job:
    changes = {"steps": 10, "checkpoint_every": 3, **case.get("train", {}), **more}
    if "lora" in case:
        changes["lora"] = Lora.model_validate(case["lora"])
    job = make_job(
        name, TRAIN.model_copy(update=changes), objective=Objective.model_validate(case.get("objective", GRAD_DIFF)),
        random=None, optimizer=TypeAdapter(Optimizer).validate_python(case.get("optimizer", SOUL4)),
    )  # fmt: skip
    mask = Wagle.model_validate(case["mask"]) if "mask" in case else None
    places = {
        "checkpoints": f"{job.output}-checkpoints",
        "events": f"{job.output}.events",
        "stop": f"{job.output}.stop",
    }
    return job.model_copy(update={**places, "mask": mask})


class Stop(Exception):
    pass


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop die in its `step`-th step, counted from 1 from here on, before anything is updated."""
    original, calls = module.optimizer_step, 0

    def dying(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Stop
        return original(*arguments)

    monkeypatch.setattr(module, "optimizer_step", dying)


QUICK = ("soul-zero3", "soul-bf16-zero1", "mask", "dual")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_stopped_and_gone_on_equals_straight(
    make_job: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 steps; stopped in the eighth, after checkpoints at 3 and 6."""
    straight, stopped = (job_of(make_job, which, CASES[name]) for which in ("straight", "stopped"))
    expected = run(straight, tmp_path)
    with monkeypatch.context() as patch:
        stop_before(8, patch)
        with pytest.raises(Stop):
            run_job(stopped, tmp_path)
    assert len(lines(stopped)) == 7
    found = run(stopped, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    states = [saved(job) for job in (straight, stopped)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [line["rows"] for line in lines(straight)] == [line["rows"] for line in lines(stopped)]
    told = [
        [{k: v for k, v in line.items() if k.startswith("train/")} for line in lines(j)] for j in (straight, stopped)
    ]
    assert told[0] == told[1]
    assert [line["step"] for line in lines(stopped)] == list(range(1, 11))
    assert {path.name for path in Path(stopped.checkpoints).iterdir()} == {"step-000006", "step-000009"}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped byte, a truncated file, a missing manifest: none is taken for a checkpoint."""
    straight, stopped = (job_of(make_job, which, {}, keep_checkpoints=9) for which in ("straight", "stopped"))
    expected = run(straight, tmp_path)
    with monkeypatch.context() as patch:
        stop_before(10, patch)
        with pytest.raises(Stop):
            run_job(stopped, tmp_path)
    place = Place(stopped.checkpoints)
    folder = Path(stopped.checkpoints)
    [shard] = (folder / "step-000009").glob("rank-0000*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    [other] = (folder / "step-000006").glob("rank-0000*.safetensors")
    other.write_bytes(other.read_bytes()[:-100])
    shutil.copytree(folder / "step-000003", folder / "step-000004")
    (folder / "step-000004" / MANIFEST).unlink()
    found = run(stopped, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    told = [event["text"] for event in events(stopped)]
    assert told[0].startswith("checkpoint of step 9 is damaged and set aside: rank-0000")
    assert "sha256" in told[0]
    assert "bytes instead of" in told[1]
    assert told[2] == "going on after step 3"
    assert (folder / "step-000006" / DAMAGED).exists()
    assert steps_kept(place) == [9, 6, 3]
    assert not (folder / "step-000004").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_left_as_it_is(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store out of reach is no damage."""
    job = job_of(make_job, "unread", {})
    run(job, tmp_path)

    def unreachable(*arguments: Any) -> None:
        raise OSError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "fetch", unreachable)
        with pytest.raises(StorageError, match=r"Checkpoint cannot be read .*connection refused"):
            run_job(job, tmp_path)
    assert steps_kept(Place(job.checkpoints)) == [9, 6]


def test_what_cannot_be_written_stops_the_run_and_leaves_earlier_checkpoints(make_job: Any, tmp_path: Path) -> None:
    job = job_of(make_job, "full", {})
    Path(job.checkpoints).mkdir()
    (Path(job.checkpoints) / "step-000006").write_text("in the way")
    with pytest.raises(StorageError, match=r"Checkpoint cannot be written \(path=.*full-checkpoints, bytes needed="):
        run_job(job, tmp_path)
    assert steps_kept(Place(job.checkpoints)) == [3]


def test_a_start_without_room_is_refused(make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three whole checkpoints must fit: weights, momentum and Hessian in fp32."""
    job = job_of(make_job, "small", {})
    one = 12 * sum(p.numel() for p in load_model(Path(job.model)).parameters())
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda place: 3 * one - 1)
    with pytest.raises(StorageError, match=f"Checkpoints would not fit .* bytes needed={3 * one:,}"):
        run_job(job, tmp_path)
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda place: 3 * one)
    run_job(job, tmp_path)
    size = manifest(Place(job.checkpoints), 9)["files"]
    assert sum(about["size"] for about in size.values()) == pytest.approx(one, rel=0.1)


def test_a_checkpoint_of_another_job_is_refused_with_the_difference(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(make_job, "one", {}).model_copy(update={"made_from": {"forget": "aaa", "normal": "bbb"}})
    with monkeypatch.context() as patch:
        stop_before(5, patch)
        with pytest.raises(Stop):
            run_job(job, tmp_path)
    other = job.model_copy(
        update={"made_from": {"forget": "aab", "normal": "bbb"}, "optimizer": SOUL.model_copy(update={"lr": 2e-3})}
    )
    with pytest.raises(ConfigError) as caught:
        run_job(other, tmp_path)
    assert "made_from.forget: aaa then, aab now; optimizer.hessian_interval: 4 then, 3 now" in str(caught.value)
    assert "optimizer.lr: 0.001 then, 0.002 now" in str(caught.value)
    assert "normal" not in str(caught.value).split("Expected")[0]


def test_a_stop_that_is_asked_for_leaves_a_checkpoint(make_job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    straight, stopped = (
        job_of(make_job, name, {}, checkpoint_every=None, micro_batch_size=3) for name in ("straight", "stopped")
    )
    expected = run(straight, tmp_path)
    original = module.optimizer_step

    def asking(*arguments: Any) -> float:
        if len(lines(stopped)) == 3:
            Path(stopped.stop).touch()
        return original(*arguments)

    Path(stopped.metrics).touch()
    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", asking)
        with pytest.raises(Stopped, match="Stopped after step 4; the same command goes on from there"):
            run_job(stopped, tmp_path)
    assert steps_kept(Place(stopped.checkpoints)) == [4]
    found = run(stopped, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_checkpoints_in_an_object_store(make_job: Any, tmp_path: Path, bucket: Any, monkeypatch: Any) -> None:
    straight, stopped = (job_of(make_job, name, {}) for name in ("straight", "stopped"))
    expected = run(straight, tmp_path)
    stopped = stopped.model_copy(update={"checkpoints": "s3://bucket/checkpoints/stopped"})
    with monkeypatch.context() as patch:
        stop_before(10, patch)
        with pytest.raises(Stop):
            run_job(stopped, tmp_path)
    place = Place(stopped.checkpoints)
    assert steps_kept(place) == [9, 6]
    [name] = (name for name in manifest(place, 9)["files"] if name.endswith("safetensors"))
    content = bytearray(place.store.cat_file(place.path(9, name)))
    content[-1] ^= 1
    place.store.pipe_file(place.path(9, name), bytes(content))
    found = run(stopped, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [event["text"] for event in events(stopped)][1] == "going on after step 6"


# --- numbers that go bad, and bounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_bad_numbers_changes_nothing(make_job: Any, tmp_path: Path, stage: int) -> None:
    """Step 4 has a loss that is not a number, step 6 a gradient that is not one: they are left out and recorded."""
    custom = {"type": "custom", "import_path": "tests.custom_terms.bad_at_times"}
    case = {"objective": {**GRAD_DIFF, "forget": custom}, "train": {"zero_stage": stage, "micro_batch_size": 3}}
    job = job_of(make_job, "bad", case, checkpoint_every=1, keep_checkpoints=20, max_bad_steps=2, steps=8)
    custom_terms.begin({4: "loss", 6: "gradient"}, micro_batches=3)
    run(job, tmp_path)
    states = {n: saved(job, n) for n in range(1, 9)}
    for n in (4, 6):
        changed = [key for key in states[n] if not torch.equal(states[n][key], states[n - 1][key])]
        assert all(key.endswith("exp_avg_sq") for key in changed), changed  # the curvature's own pass was good
    assert any(not torch.equal(states[5][key], states[4][key]) for key in states[4] if key.endswith("weights"))
    assert [line["step"] for line in lines(job) if "train/bad_steps" in line] == [4, 6]
    told = [event for event in events(job) if event["event"] == "bad_step"]
    assert [event["step"] for event in told] == [4, 6]
    assert len(told[0]["rows"]["forget"]) == 7  # the last batch of the epoch
    custom_terms.begin({4: "loss", 6: "gradient"}, micro_batches=3)
    strict = job_of(make_job, "strict", case, checkpoint_every=1, max_bad_steps=1, steps=8)
    with pytest.raises(TrainingError) as caught:
        run_job(strict, tmp_path)
    assert "Gradient of the objective at step 6 is not finite" in str(caught.value)
    assert f"forget {told[1]['rows']['forget'][0]}" in str(caught.value)
    assert "The last checkpoint is that of step 5." in str(caught.value)


def test_a_guard_ends_training_and_keeps_the_last_state_within_it(make_job: Any, tmp_path: Path) -> None:
    """The normal loss of step n+1 is that of the model after step n, which is then known."""
    free = job_of(make_job, "free", {"objective": {**GRAD_DIFF, "forget": {"type": "gradient_ascent", "weight": 3.0}}})
    free = free.model_copy(update={"train": free.train.model_copy(update={"checkpoint_every": 1})})
    run(free, tmp_path)
    losses = [line["train/normal_loss"] for line in lines(free)]
    bound = (losses[6] + max(losses[:6])) / 2
    assert losses[6] > bound > max(losses[:6])
    job = free.model_copy(
        update={
            "output": str(tmp_path / "kept"), "metrics": str(tmp_path / "kept.jsonl"),
            "events": str(tmp_path / "kept.events"), "checkpoints": str(tmp_path / "kept-checkpoints"),
            "guards": [Guard(metric="train/normal_loss", max=bound)],
        }
    )  # fmt: skip
    assert run_job(job, tmp_path)["steps"] == 5
    assert len(lines(job)) == 7
    assert "above" in events(job)[-1]["text"]
    assert "in step 7; the model is that of step 5" in events(job)[-1]["text"]
    short = free.model_copy(
        update={
            "output": str(tmp_path / "short"), "metrics": str(tmp_path / "short.jsonl"), "checkpoints": None,
            "train": free.train.model_copy(update={"steps": 5}),
        }
    )  # fmt: skip
    assert distance(run(short, tmp_path), weights(job)) == 0.0
    hopeless = job.model_copy(
        update={
            "checkpoints": str(tmp_path / "none"), "output": str(tmp_path / "none-model"),
            "guards": [Guard(metric="train/normal_loss", max=min(losses) / 2)],
        }
    )  # fmt: skip
    with pytest.raises(TrainingError, match="A guard was broken before any checkpoint"):
        run_job(hopeless, tmp_path)


KEPT, FORGOTTEN = "probe/normal_probability", "probe/forget_probability"


def probed(make_job: Any, name: str, **more: Any) -> Job:
    ascent = {"objective": {**GRAD_DIFF, "forget": {"type": "gradient_ascent", "weight": 3.0}}}
    return job_of(make_job, name, ascent, checkpoint_every=2, steps=8, probe=Probe(every=2, rows=5), **more)


def check_probe(job: Job, line: dict[str, Any]) -> None:
    """What the probe said at the end, against plain forward passes of the model that was written."""
    setup, steps = loop.set_up(job, 0, 1, torch.device("cpu"))
    rows = probe_rows(setup, job.train.probe, steps)
    model = load_model(Path(job.output))
    for metric, own, chosen in (
        (KEPT, setup.batcher.normal, rows.normal),
        (FORGOTTEN, setup.batcher.forget, rows.forget),
    ):
        values = []
        for i in chosen:
            with torch.no_grad():
                logp = answer_logits(model, own.prompt(i), own.answer(i)).double().log_softmax(-1)
            values.append(logp[np.arange(len(logp)), own.answer(i).astype(np.int64)].mean().exp())
        assert float(torch.stack(values).mean()) == pytest.approx(line[metric], abs=1e-6)


def test_the_probe_measures_the_model_as_it_stands_and_chooses_the_best(make_job: Any, tmp_path: Path) -> None:
    """Against plain forward passes; the best checkpoint becomes the model."""
    job = probed(make_job, "probed", micro_batch_size=2)
    run(job, tmp_path)
    found = {line["step"]: line[KEPT] for line in lines(job) if KEPT in line}
    assert list(found) == [2, 4, 6, 8]
    check_probe(job, lines(job)[-1])
    lowest, highest = min(found, key=lambda n: found[n]), max(found, key=lambda n: found[n])
    best = probed(
        make_job, "best", keep_checkpoints=1, checkpoint_best=Best(metric=KEPT, mode="max"), micro_batch_size=2
    )
    assert highest != lowest
    assert run_job(best, tmp_path)["steps"] == highest
    assert set(steps_kept(Place(best.checkpoints))) == {highest, 8}


@pytest.mark.slow
def test_the_probe_is_the_same_on_two_ranks(make_job: Any, tmp_path: Path) -> None:
    """Under ZeRO-3, with ranks that have unequal shares of the five rows."""
    job = probed(make_job, "two", micro_batch_size=2)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    on_two_ranks(tmp_path / "job.json")
    check_probe(job, lines(job)[-1])
