"""Checkpoints: a run that was stopped and gone on with is bit for bit the run that was not."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import TypeAdapter

from components.config import Lora, Objective, Optimizer, Wagle
from components.errors import TrainingError
from components.training import loop
from components.training.checkpoint import newest
from components.training.job import Job
from components.training.launch import run_job
from tests.training import SOUL, TRAIN, distance, join, lines, run, weights

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
    return job.model_copy(update={"checkpoints": f"{job.output}-checkpoints", "mask": mask})


class Stop(Exception):
    pass


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop die in its `step`-th step, counted from 1 from here on, before anything is updated."""
    original, calls = loop.optimizer_step, 0

    def dying(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Stop
        return original(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", dying)


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
    folder = Path(stopped.checkpoints)
    shard = folder / "step-000009" / "rank-0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    other = folder / "step-000006" / "rank-0000.safetensors"
    other.write_bytes(other.read_bytes()[:-100])
    shutil.copytree(folder / "step-000003", folder / "step-000004")
    (folder / "step-000004" / "manifest.json").unlink()
    assert newest(folder) == folder / "step-000003"
    assert {path.name for path in folder.glob("*.damaged")} == {f"step-00000{n}.damaged" for n in (4, 6, 9)}
    found = run(stopped, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_cannot_be_written_stops_the_run_and_leaves_earlier_checkpoints(make_job: Any, tmp_path: Path) -> None:
    job = job_of(make_job, "full", {})
    Path(job.checkpoints).mkdir()
    (Path(job.checkpoints) / "step-000006.partial").write_text("in the way")
    with pytest.raises(TrainingError, match="Checkpoint cannot be written"):
        run_job(job, tmp_path)
    assert newest(Path(job.checkpoints)) == Path(job.checkpoints) / "step-000003"


# --- real processes ---------------------------------------------------------------------------------------------------


def one_of_two(rank: int, folder: str) -> None:
    join(rank, folder)
    job = Job.model_validate(pickle.loads(Path(folder, "job").read_bytes()))
    loop.train_loop(job, rank, 2, torch.device("cpu"))


def on_two_ranks(job: Job, folder: Path) -> None:
    folder.mkdir()
    (folder / "job").write_bytes(pickle.dumps(job.model_dump(mode="json")))
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_other_numbers_of_workers_go_on_from_each_others_checkpoints(make_job: Any, tmp_path: Path, stage: int) -> None:
    """6 steps on 2 ranks, then on 1, and the other way round: as 12 straight steps, every row as often."""
    case = {"train": {"zero_stage": stage, "micro_batch_size": 2, "steps": 12}}
    expected = run(job_of(make_job, "straight", case), tmp_path)
    for name, first, second in (("2to1", 2, 1), ("1to2", 1, 2)):
        half = job_of(make_job, name, case, steps=6)
        whole = half.model_copy(update={"train": half.train.model_copy(update={"steps": 12})})
        for i, (ranks, job) in enumerate(((first, half), (second, whole))):
            shutil.rmtree(job.output, ignore_errors=True)
            on_two_ranks(job, tmp_path / f"{name}{i}") if ranks == 2 else run_job(job, tmp_path)
        assert distance(weights(whole), expected) < 1e-5
        assert [line["step"] for line in lines(whole)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_killed_worker_is_replaced_and_nothing_is_lost(make_job: Any, tmp_path: Path, dtype: str) -> None:
    """SIGKILL of one of two Ray workers under ZeRO-3 with accumulation: the same model, bit for bit."""
    settings = {"workers": 2, "micro_batch_size": 2, "steps": 30, "checkpoint_every": 4, "dtype": dtype}
    straight, killed = (job_of(make_job, which, {"train": settings}) for which in ("straight", "killed"))
    expected = run(straight, tmp_path)
    done = threading.Event()
    threading.Thread(target=kill_a_worker_at, args=(Path(killed.metrics), 14, done)).start()
    told: list[str] = []
    run_job(killed, tmp_path, told.append)
    assert done.is_set()
    assert len(told) == 1
    assert "Attempt 2 of 4" in told[0]
    found = weights(killed)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [line["step"] for line in lines(killed)] == list(range(1, 31))


def kill_a_worker_at(metrics: Path, step: int, done: threading.Event) -> None:
    while steps_done(metrics) < step:
        time.sleep(0.02)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    workers[-1].send_signal(signal.SIGKILL)
    done.set()


@pytest.mark.slow
def test_a_killed_process_goes_on_where_its_checkpoints_end(make_job: Any, tmp_path: Path) -> None:
    """SIGKILL of a whole process at six moments, during writes too; each time the same command is given again."""
    job = job_of(make_job, "killed", {"train": {"micro_batch_size": 3}}, steps=40, checkpoint_every=2)
    straight = job_of(make_job, "straight", {"train": {"micro_batch_size": 3}}, steps=40, checkpoint_every=2)
    expected = run(straight, tmp_path)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from components.training.job import Job;"
        "from components.training.launch import run_job;"
        "run_job(Job.model_validate_json(Path(sys.argv[1]).read_text()), Path('.'))"
    )
    reached, kills = 0, 0
    while not Path(job.output).exists():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "job.json")], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        goal = reached + 3 + kills % 3
        while process.poll() is None and steps_done(Path(job.metrics)) < goal:
            time.sleep(0.005)
        time.sleep(0.01 * (kills % 4))
        if process.poll() is None and kills < 6:
            process.kill()
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        reached = steps_done(Path(job.metrics))
    assert kills == 6
    found = weights(job)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [json.loads(line)["step"] for line in Path(job.metrics).read_text().splitlines()] == list(range(1, 41))


def steps_done(metrics: Path) -> int:
    try:
        return len(metrics.read_text().splitlines())
    except OSError:
        return 0
