"""Real faults: processes, nodes and servers that are killed, disks that are full. Nothing is lost, nothing doubled."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from components.errors import StorageError
from components.files import read_lines
from components.training.checkpoint_files import MANIFEST, Place, steps_kept
from components.training.job import Job
from components.training.launch import run_job
from tests.drive import on_two_ranks
from tests.mlflow_server import Server, running
from tests.test_checkpoint import GRAD_DIFF, job_of
from tests.test_pipelines import ROOT, SMALL, command
from tests.training import distance, events, lines, run, saved, steps_done, weights

pytestmark = pytest.mark.faults
SPLIT = {"workers": 2, "zero_stage": 3, "micro_batch_size": 2, "steps": 30, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def straight(storage: Path) -> dict[str, Job]:
    """Undisturbed runs that have been made, by their precision."""
    return {}


def job_like(make_job: Any, name: str, dtype: str, **changes: Any) -> Job:
    patient = {"type": "custom", "import_path": "tests.custom_terms.patient_ascent"}
    return job_of(
        make_job, name, {"objective": {**GRAD_DIFF, "forget": patient}, "train": {**SPLIT, "dtype": dtype, **changes}}
    )


def check_same(make_job: Any, straight: dict[str, Job], found: Job, storage: Path) -> None:
    """Same model, same optimizer state, same rows in the same order, each step once: to the bit."""
    dtype = found.train.dtype
    if dtype not in straight:
        job = job_like(make_job, "straight", dtype)
        job = job.model_copy(
            update={
                key: str(storage / f"straight-{dtype}{key}") for key in ("output", "metrics", "checkpoints", "events")
            }
        )
        file = storage / f"straight-{dtype}.json"
        file.write_text(job.model_dump_json())
        on_two_ranks(file)  # no Ray: it gives the same to the bit, and is there in a few seconds
        straight[dtype] = job
    expected = straight[dtype]
    ours, theirs = weights(found), weights(expected)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    states = [saved(job, 30) for job in (found, expected)]
    assert states[0].keys() == states[1].keys()
    assert {key.rpartition(".")[2] for key in states[0]} == {"weights", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [(line["step"], line["rows"]) for line in lines(found)] == [
        (line["step"], line["rows"]) for line in lines(expected)
    ]


def when(reached: Callable[[], bool], act: Callable[[], None], patience: float = 120) -> threading.Event:
    """Do `act` in a thread as soon as `reached`. Returns what is set when it is done, and never if that never was."""
    done = threading.Event()

    def wait() -> None:
        deadline = time.monotonic() + patience
        while not reached():
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        act()
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    return done


def train_workers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]


def start(job: Job, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The job in a process of its own, with its own process group."""
    file = folder / "job.json"
    file.write_text(job.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "tests.drive", str(file), *arguments], start_new_session=True, stderr=subprocess.PIPE,
        env={**os.environ, **environment}, cwd=Path(__file__).parents[1], text=True,
    )  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "to_worker", "to_driver"),
    [
        ("fp32", signal.SIGSTOP, signal.SIGKILL),
        pytest.param("bf16", signal.SIGKILL, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_one_run_survives_what_happens_to_its_processes(
    make_job: Any, tmp_path: Path, cluster_address: str, dtype: str, to_worker: int, to_driver: int, straight: Any,
    storage: Path,
) -> None:  # fmt: skip
    """One of two Ray workers is killed or hangs, later the driver is killed or stopped; each at a random step."""
    from ray.util import placement_group_table

    job = job_like(make_job, "hard-life", dtype, timeout=10)
    random_ = random.Random(dtype)
    first, second = random_.randrange(4, 10), random_.randrange(13, 24)
    place = Place(job.checkpoints or "")
    far = lambda: steps_done(job.metrics) >= first and bool(steps_kept(place))  # noqa: E731
    hit = when(far, lambda: train_workers()[-1].send_signal(to_worker))
    process = start(job, tmp_path, RAY_ADDRESS=cluster_address)
    reached = lambda: hit.is_set() and steps_done(job.metrics) >= second  # noqa: E731
    assert when(reached, lambda: process.send_signal(to_driver), patience=180).wait(180)
    code = process.wait(60)
    told = [event for event in events(job) if event["event"] == "failure"]
    assert len(told) == 1
    assert "Attempt 2 of 4" in told[0]["text"]
    if to_driver == signal.SIGINT:
        assert code == 130
        assert "the same command goes on from there" in process.communicate()[1]
        assert steps_kept(Place(job.checkpoints or ""))[0] == steps_done(job.metrics) < 30

    deadline = time.monotonic() + 30  # no actor and no placement group of the driver lives on
    while time.monotonic() < deadline and (left := living(placement_group_table()) or train_workers()):
        time.sleep(0.5)
    assert not left

    process = start(job, tmp_path, RAY_ADDRESS=cluster_address)
    assert process.wait(180) == 0, process.communicate()[1]
    assert [event["event"] for event in events(job)].count("resumed") == 2
    check_same(make_job, straight, job, storage)


def living(groups: dict[str, Any]) -> list[str]:
    return [name for name, group in groups.items() if group["state"] != "REMOVED"]


def test_nodes_go(make_job: Any, tmp_path: Path, straight: Any, storage: Path) -> None:
    """Of four nodes one is drained and one killed. What was announced is no failure, and the checkpoint was in time."""
    job = job_like(make_job, "nodes", "fp32", max_failures=1, checkpoint_every=30)
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    short = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # a socket's path must be
    environment = {
        **os.environ, "RAY_TMPDIR": short.name, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "PATIENCE": "0.3",
    }  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-m", "tests.nodes", str(file)], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["nodes"] == 2
    assert [event["event"] for event in events(job)] == ["notice", "resumed", "failure", "resumed"]
    [failure] = [event["text"] for event in events(job) if event["event"] == "failure"]
    assert f"id {told['killed'][:8]}" in failure
    assert "Most likely the machine was switched off" in failure
    assert "GLHF" not in failure
    assert "workers=0" not in failure
    check_same(make_job, straight, job, storage)


@pytest.mark.long
def test_nodes_that_do_not_see_the_storage_are_named(make_job: Any, tmp_path: Path, storage: Path) -> None:
    """Before any work begins; and whatever it is that meets the missing files later."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("no right to give a process another view of the file system")
    job = job_of(make_job, "blind", {"train": {**SPLIT, "workers": 3}})
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    short = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    found = subprocess.run(
        [sys.executable, "-m", "tests.blind_nodes", str(file), str(storage)], cwd=ROOT, capture_output=True, text=True,
        timeout=200, env={**os.environ, "RAY_TMPDIR": short.name},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout.splitlines()[-1])
    told, ids = answer["told"], answer["ids"]
    assert len(ids) == 3
    assert told["check"].startswith("Nodes do not share the storage folder")
    assert all(f"id {name})" in told["check"] for name in ids)
    assert told["check"].count("No such file or directory") == 2
    assert told["check"].count("Read-only file system") == 1
    for text in (told["prepare"], told["train"]):
        assert any(f"id {name})" in text for name in ids), text
        assert "Expected the same files on every node" in text
        assert "workers=0" not in text
        assert "\n" not in text


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_killed_while_a_checkpoint_is_written(
    make_job: Any, tmp_path: Path, dtype: str, straight: Any, storage: Path
) -> None:
    """SIGKILL of all processes when the files of step 12 are there and its manifest is not."""
    job = job_like(make_job, "writing", dtype)
    folder = Path(job.checkpoints or "") / "step-000012"

    def is_writing() -> bool:
        return any(folder.glob("rank-*")) and not (folder / MANIFEST).exists()

    process = start(job, tmp_path, "0.1")
    assert when(is_writing, lambda: os.killpg(process.pid, signal.SIGKILL)).wait(120)
    process.wait()
    assert not (folder / MANIFEST).exists()
    assert steps_kept(Place(job.checkpoints or "")) == [9, 6]
    on_two_ranks(tmp_path / "job.json")
    assert "going on after step 9" in [event["text"] for event in events(job)]
    check_same(make_job, straight, job, storage)


def test_other_numbers_of_workers_go_on_from_each_others_checkpoints(make_job: Any, tmp_path: Path) -> None:
    """6 steps on 2 ranks, then 6 on 1, and the other way round: as 12 straight steps, every row as often."""
    case = {"train": {"zero_stage": 3, "micro_batch_size": 2, "steps": 12, "checkpoint_every": 6}}
    expected = job_of(make_job, "straight", case)
    run(expected, tmp_path)
    for name, first, second in (("2to1", 2, 1), ("1to2", 1, 2)):
        job = job_of(make_job, name, case)
        file = tmp_path / f"{name}.json"
        file.write_text(job.model_dump_json())
        for ranks in (first, second):
            on_two_ranks(file) if ranks == 2 else run_job(job, tmp_path)
            if ranks == first and steps_kept(Place(job.checkpoints or ""))[0] == 12:
                for path in sorted((Path(job.checkpoints or "") / "step-000012").iterdir()):
                    path.unlink()
                for path in Path(job.output).iterdir():
                    path.unlink()
                Path(job.output).rmdir()
        assert distance(weights(job), weights(expected)) < 1e-5
        assert [line["rows"] for line in lines(job)] == [line["rows"] for line in lines(expected)]
        told = f"workers: {first} then, {second} now; the result is equal up to the order of sums, not to the bit"
        assert told in [event["text"] for event in events(job)]


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB, as a file system of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints_whole(
    make_job: Any, tmp_path: Path, small_disk: Path
) -> None:
    """It fills while the run goes on; when there is room again, the same command gives the same model."""
    expected = run(job_of(make_job, "straight", {}), tmp_path)
    job = job_of(make_job, "full", {}, keep_checkpoints=1)
    job = job.model_copy(update={"checkpoints": str(small_disk / "checkpoints")})

    def fill() -> None:
        free = os.statvfs(small_disk)
        (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - 100_000))

    filled = when(lambda: steps_kept(Place(job.checkpoints or "")) == [3], fill)
    with pytest.raises(StorageError, match=r"Checkpoint cannot be written .*bytes needed=.*No space left on device"):
        run_job(job, tmp_path)
    assert filled.is_set()
    [kept] = steps_kept(Place(job.checkpoints or ""))
    assert kept < 9
    with pytest.raises(StorageError, match="Checkpoints would not fit"):
        run_job(job, tmp_path)
    (small_disk / "other").unlink()
    found = run(job, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert f"going on after step {kept}" in [event["text"] for event in events(job)]


def test_a_read_only_disk_is_named(make_job: Any, tmp_path: Path, small_disk: Path) -> None:
    job = job_of(make_job, "locked", {}).model_copy(update={"output": str(small_disk / "model"), "checkpoints": None})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"Model cannot be written .*Read-only file system"):
        run_job(job, tmp_path)


# --- whole commands, MLflow -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, cluster_address: str) -> Path:
    """The small recipe, trained longer, without evaluation."""
    folder = tmp_path_factory.mktemp("faults")
    train = {**SMALL["train"], "workers": 0, "steps": 150, "checkpoint_every": 20}
    changed = {"train": train, "evaluation": {"sets": {}}, "gates": [], "storage": str(folder / "runs")}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changed}))
    made = command("finetune", str(file), RAY_ADDRESS=cluster_address)
    assert made.returncode == 0, made.stderr
    return file


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(Server(tmp_path / "server")) as server:
        yield server


def the_run(folder: Path) -> Path:
    [found] = [path for path in folder.iterdir() if "-soul-small-" in path.name]
    return found


def test_mlflow_that_dies_loses_nothing_and_slows_nothing(
    recipe: Path, server: Server, tmp_path: Path, cluster_address: str
) -> None:
    """It hangs from step 5 on, is killed at step 60, and started again when the run is over."""
    from mlflow import MlflowClient

    def arguments(name: str) -> list[str]:
        storage = tmp_path / name
        storage.mkdir()
        (storage / "models").symlink_to(recipe.parent / "runs" / "models")
        return [str(recipe), f"storage={storage}", f"tracking.uri={server.uri}"]

    undisturbed = command("unlearn", *arguments("calm"), RAY_ADDRESS=cluster_address)
    assert undisturbed.returncode == 0, undisturbed.stderr
    typed = arguments("disturbed")
    hung = when(lambda: steps_done(tmp_path / "disturbed") >= 5, lambda: os.killpg(server.process.pid, signal.SIGSTOP))
    killed = when(lambda: hung.is_set() and steps_done(tmp_path / "disturbed") >= 60, server.kill)
    done = command("unlearn", *typed, RAY_ADDRESS=cluster_address)
    assert killed.is_set()
    assert done.returncode == 0, done.stderr
    assert "entries wait in" in done.stdout
    folder = the_run(tmp_path / "disturbed")
    times = [step_seconds(the_run(tmp_path / name)) for name in ("calm", "disturbed")]
    assert times[1] < 1.1 * times[0], times
    server.start()
    again = command("unlearn", *typed)
    assert "entries sent" in again.stdout, again.stdout + again.stderr
    assert "small-candidates version" in again.stdout
    client = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
    runs = client.search_runs(["1"], f"attributes.run_name = '{folder.name}'")
    [run] = [run for run in runs if str(tmp_path / "disturbed") in run.data.tags["run_folder"]]
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/forget_loss")
    assert sorted(point.step for point in history) == list(range(1, 151))
    written = read_lines(folder / "metrics.jsonl")
    assert {point.step: point.value for point in history} == {n["step"]: n["train/forget_loss"] for n in written}
    assert {point.timestamp for point in history} == {int(n["time"] * 1000) for n in written}
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1


def step_seconds(folder: Path) -> float:
    """The lower quartile: what else the machine does makes steps slower, never faster."""
    lines = read_lines(folder / "metrics.jsonl")[5:]
    return statistics.quantiles([line["perf/step_seconds"] for line in lines], n=4)[0]


def test_a_command_that_is_stopped_says_so_everywhere(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM: exit code 143, a checkpoint, an MLflow run that is KILLED; the same command finishes the same run."""
    from mlflow import MlflowClient

    typed = given(recipe, tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / "unlearn.py"), *typed], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert when(lambda: steps_done(tmp_path) >= 30, process.terminate).wait(120)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "SIGTERM: stopping after this step, with a checkpoint" in out
    assert "the same command goes on from there" in err
    folder = the_run(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    [run] = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    again = command("unlearn", *typed)
    assert again.returncode == 0, again.stderr
    assert "attempt      2" in again.stdout
    assert "going on after step" in again.stdout
    [run] = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["attempts"] == "2"
    history = client.get_metric_history(run.info.run_id, "train/forget_loss")
    assert sorted(point.step for point in history) == list(range(1, 151))
    assert "going on after step" in (folder / "report.html").read_text()
    assert not (folder / "checkpoints").exists()


def test_what_timeout_sends_is_one_request(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM to the command and at once to its group, of which the Ray that it started is no part."""
    more = ["train.workers=2", "train.zero_stage=3", "train.steps=4000", "train.checkpoint_every=4000"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        ["timeout", "--preserve-status", "200", sys.executable, str(ROOT / "pipelines" / "unlearn.py"),
         *given(recipe, tmp_path, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert when(lambda: steps_done(tmp_path) >= 20, process.terminate).wait(120)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert out.count("stopping after this step, with a checkpoint") == 1
    assert "the same command goes on from there" in err
    assert steps_kept(Place(str(the_run(tmp_path) / "checkpoints"))) == [steps_done(tmp_path)]


def test_a_run_whose_console_is_lost_is_registered(recipe: Path, tmp_path: Path, cluster_address: str) -> None:
    """Its reader goes after a line, its encoding is ASCII, and so is the locale's, by which files would be read."""
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    japanese = tmp_path / "more.yaml"
    japanese.write_text("data: {template: '東京 ↓ {prompt}'}\n", encoding="utf-8")
    typed = given(recipe, tmp_path, str(japanese), "train.steps=10", "train.checkpoint_every=5")
    shell = ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash"]
    done = subprocess.run(
        [*shell, sys.executable, str(ROOT / "pipelines" / "unlearn.py"), *typed], capture_output=True, text=True,
        timeout=200, env={**os.environ, **plain, "RAY_ADDRESS": cluster_address},
    )  # fmt: skip
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    folder = the_run(tmp_path)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["version"] == "1"
    assert "東京 ↓" in (folder / "config.json").read_text(encoding="utf-8")


def original_of(recipe: Path) -> Path:
    return next(f for f in (recipe.parent / "runs" / "models").glob("original-*") if f.is_dir() and "." not in f.name)


def given(recipe: Path, storage: Path, *more: str) -> list[str]:
    """The recipe's command with a storage of its own and the original model that is there already."""
    original = f"models.original={{type: pretrained, path: {original_of(recipe)}}}"
    return [str(recipe), f"storage={storage}", original, *more]


def test_steps_with_bad_numbers_in_a_whole_command(recipe: Path, tmp_path: Path, cluster_address: str) -> None:
    term = "objective.forget={type: custom, import_path: tests.custom_terms.bad_at_times}"
    bad = json.dumps({1: "loss", 4: "gradient"})
    environment = {"RAY_ADDRESS": cluster_address, "PYTHONPATH": str(ROOT), "BAD_STEPS": bad}
    more = ["train.steps=8", "train.micro_batch_size=6", "train.checkpoint_every=2", "train.probe={every: 2, rows: 4}"]
    refused = command("unlearn", *given(recipe, tmp_path, term, *more, "train.max_bad_steps=1"), **environment)
    assert refused.returncode == 1
    assert "Gradient of the objective at step 4 is not finite" in refused.stderr
    assert "Rows of the batch: forget " in refused.stderr
    assert "The last checkpoint is that of step 2." in refused.stderr
    done = command("unlearn", *given(recipe, tmp_path, term, *more, "train.max_bad_steps=5"), **environment)
    assert done.returncode == 0, done.stderr
    assert "going on after step 2" in done.stdout
    report = (the_run(tmp_path) / "report.html").read_text()
    assert "step 1 left out, 1 of 1 allowed" in report


def test_rows_that_changed_under_an_unfinished_run_are_refused(
    recipe: Path, tmp_path: Path, cluster_address: str
) -> None:
    """And `if_exists=new` starts beside it."""
    rows = tmp_path / "rows.jsonl"
    forget = f"data.forget=[{{type: files, path: {rows}, prompt: q, answer: a}}]"
    typed = given(recipe, tmp_path / "runs", forget, "train.steps=400", "data.max_bad_fraction=1.0")

    def write(count: int) -> None:
        rows.write_text("".join(json.dumps({"q": f"Who is {i}?", "a": f"Number {i}."}) + "\n" for i in range(count)))

    def stop_midway(*more: str) -> int:
        said = tmp_path / "stderr.txt"
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "pipelines" / "unlearn.py"), *typed, *more], stdout=subprocess.DEVNULL,
                stderr=stderr, env={**os.environ, "RAY_ADDRESS": cluster_address},
            )  # fmt: skip
        before = steps_done(tmp_path / "runs")
        midway = when(lambda: steps_done(tmp_path / "runs") > before + 5, process.terminate)
        assert midway.wait(120), said.read_text()
        return process.wait(60)

    write(8)
    assert stop_midway() == 143
    write(12)
    refused = command("unlearn", *typed, RAY_ADDRESS=cluster_address)
    assert refused.returncode == 2
    assert "Run was begun with other models or rows" in refused.stderr
    assert "forget: " in refused.stderr
    assert stop_midway("if_exists=new") == 143
    assert len(list((tmp_path / "runs").glob("gradient-ascent*"))) == 2
