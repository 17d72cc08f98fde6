"""Fifty kills at random moments over a short run: nothing lost, nothing doubled, nothing left behind.

    python -m tests.kills [--kills 50] [--seed 0] [--minutes 30]

The same command is typed again and again and killed: the driver, a worker, the driver by SIGTERM, at a random second
or step. Whenever it comes to its end, model, steps and rows are compared with an undisturbed run's and MLflow's points
are counted; then it begins anew. After every kill, processes and the shared-memory folder are looked at.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from components.files import read_lines
from tests.test_pipelines import ROOT, SMALL
from tests.training import steps_done

STEPS = 60


def main() -> int:
    """Print a line for each kill and each finished run, then the sum. Exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    draw, deadline = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    recipe = folder / "recipe.yaml"
    train = {**SMALL["train"], "steps": STEPS, "checkpoint_every": 5, "max_failures": 3}
    changes = {"train": train, "evaluation": {"sets": {}}, "gates": [], "storage": str(folder / "straight")}
    recipe.write_text(yaml.safe_dump({**SMALL, **changes}))
    subprocess.run(typed(recipe), check=True, stdout=subprocess.DEVNULL)
    straight = run_folder(folder / "straight")
    shm, wrong, kills, finished = shared_memory(), [], Counter[str](), 0
    storage = folder / "killed"
    storage.mkdir()
    shutil.copytree(folder / "straight" / "models", storage / "models")
    while kills.total() < options.kills and time.monotonic() < deadline:
        how, ended, problem = one_life(recipe, storage, draw)
        if how:
            kills[how] += 1
        if ended:
            finished += 1
            wrong += differences(straight, run_folder(storage), storage)
            print(f"finished {finished}: {len(wrong)} wrong so far", flush=True)
            shutil.rmtree(run_folder(storage))
            (storage / "mlflow.db").unlink()
        wrong += problem
        if (grown := shared_memory() - shm) > 1 << 20:
            wrong.append(f"shared memory grew by {grown:,} bytes after {how}")
        print(f"{kills.total():>3} kills  {how or 'none':<14} {problem or ''}", flush=True)
    wrong += one_life(recipe, storage, None)[2]
    wrong += differences(straight, run_folder(storage), storage)
    shutil.rmtree(folder)
    print(f"{dict(kills)}, {finished + 1} runs finished, wrong: {wrong or 'nothing'}")
    return 1 if wrong else 0


def typed(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "unlearn.py"), str(recipe), *more]


def one_life(recipe: Path, storage: Path, draw: random.Random | None) -> tuple[str | None, bool, list[str]]:
    """Type the command and kill something, or with None let it be.

    Returns (what was killed, whether the run came to its end, what was wrong).
    """
    mark = f"KILLS_{os.getpid()}_{time.monotonic_ns()}"
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            typed(recipe, f"storage={storage}"), stdout=out, stderr=out, env={**os.environ, mark: "1"},
        )  # fmt: skip
        how = kill_something(process, storage, draw, mark) if draw else None
        code = process.wait()
        out.seek(0)
        told = out.read()
    problem = []
    expected = {None: (0,), "a worker": (0,), "SIGTERM": (143, 0)}.get(how, (-signal.SIGKILL, 0))
    if code not in expected:
        problem.append(f"{how}: exit code {code}: {told[-600:]}")
    deadline = time.monotonic() + 90  # Ray's agents look for a lost head for up to 60 s before they give up
    while time.monotonic() < deadline and (left := descendants(mark)):
        time.sleep(0.3)
    if left:
        problem.append(f"left behind after {how}: {left}")
        for pid, _ in left:
            os.kill(pid, signal.SIGKILL)
    return how, code == 0, problem


def kill_something(process: subprocess.Popen, storage: Path, draw: random.Random, mark: str) -> str | None:
    how = draw.choice(["driver", "driver", "SIGTERM", "a worker", "everything"])
    at_step = draw.random() < 0.6 or how == "a worker"
    step, seconds, started = draw.randrange(1, STEPS), draw.uniform(1, 25), time.monotonic()
    before = steps_done(storage)
    while process.poll() is None:
        if at_step and before < steps_done(storage) >= min(STEPS - 1, before + 1 + step // 3):
            break
        if not at_step and time.monotonic() - started > seconds:
            break
        time.sleep(0.005)
    if process.poll() is not None:
        return None
    if how == "a worker":
        workers = [pid for pid, name in descendants(mark) if "RayTrainWorker" in name]
        for pid in draw.sample(workers, 1) if workers else []:
            os.kill(pid, signal.SIGKILL)
    elif how == "everything":
        for pid, _ in descendants(mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    else:
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    return how


def descendants(mark: str) -> list[tuple[int, str]]:
    """(pid, command) of living processes that inherited the environment of the command so marked."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.environ():
                found.append((process.pid, " ".join(process.cmdline())[:100]))
        except (psutil.Error, OSError):
            continue
    return found


def run_folder(storage: Path) -> Path:
    [found] = storage.glob("gradient-ascent*")
    return found


def differences(expected: Path, found: Path, storage: Path) -> list[str]:
    """What is not as in the undisturbed run."""
    from mlflow import MlflowClient

    wrong = []
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    if any(not torch.equal(ours[key], theirs[key]) for key in theirs):
        wrong.append("another model")
    lines = [
        [(line["step"], line["rows"]) for line in read_lines(folder / "metrics.jsonl")] for folder in (found, expected)
    ]
    if lines[0] != lines[1]:
        wrong.append("other steps or rows")
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    runs = client.search_runs(["1"])
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        wrong.append(f"MLflow runs: {[run.info.status for run in runs]}")
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    if sorted(point.step for point in history) != list(range(1, STEPS + 1)):
        wrong.append(f"MLflow points: {len(history)}")
    counts = client.get_metric_history(runs[0].info.run_id, "rows/forget")
    if len(counts) > 1:
        wrong.append(f"MLflow points of the data: {len(counts)}")
    if len(client.search_model_versions(f"run_id = '{runs[0].info.run_id}'")) != 1:
        wrong.append("model versions")
    return wrong


def shared_memory() -> int:
    return sum(file.stat().st_blocks * 512 for file in Path("/dev/shm").rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
