"""`ray job submit` on a real head with dashboard and token authentication."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tests.test_pipelines import SMALL
from tests.training import steps_done

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ray(*arguments: str, environment: dict[str, str], timeout: int = 300) -> subprocess.CompletedProcess:
    binary = str(Path(sys.executable).parent / "ray")
    return subprocess.run(
        [binary, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment for clients of a head started by cluster/local/head.sh."""
    folder = tmp_path_factory.mktemp("head")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "HF_"))}
    environment |= {
        "PORT": str(free_port()), "DASHBOARD_PORT": str(free_port()), "AGENT_PORT": str(free_port()),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = [str(ROOT / "cluster" / "local" / "head.sh")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*script, "--num-cpus=2"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    exports = subprocess.run([*script, "--env"], env=environment, capture_output=True, text=True, check=True).stdout
    client = dict(environment)
    for assignment in exports.replace("export ", "").split():
        key, _, value = assignment.partition("=")
        client[key] = value.strip("'")
    try:
        for _ in range(60):
            if process.poll() is not None:
                pytest.fail((folder / "log").read_text())
            if submit(client, "true", job="ready").returncode == 0:
                break
            time.sleep(2)
        else:
            pytest.fail("the head's job server did not come up: " + (folder / "log").read_text())
        yield client
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:  # in order it takes 30 s
            child.kill()
        process.wait(timeout=60)


def submit(head: dict[str, str], *entrypoint: str, job: str, wait: bool = True) -> subprocess.CompletedProcess:
    options = ["--submission-id", job, "--working-dir", ".", *([] if wait else ["--no-wait"])]
    return ray("job", "submit", *options, "--", *entrypoint, environment=head)


def test_the_code_comes_from_the_upload(head: dict[str, str]) -> None:
    done = submit(head, "python", "-c", "import components; print(components.__file__)", job="where")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "working_dir_files" in done.stdout


def test_without_the_token_nobody_gets_in(head: dict[str, str]) -> None:
    stranger = {**head, "RAY_AUTH_MODE": "disabled"}
    assert ray("job", "list", environment=stranger).returncode != 0


def test_the_main_job_runs_as_a_ray_job_and_goes_on_after_a_stop(head: dict[str, str], tmp_path: Path) -> None:
    """`ray job stop` leaves a checkpoint and an MLflow run that is KILLED; submitted again, it comes to its end."""
    recipe = tmp_path / "small.yaml"
    train = {**SMALL["train"], "steps": 60, "log_every": 20}
    recipe.write_text(yaml.safe_dump({**SMALL, "train": train, "storage": str(tmp_path / "runs")}))
    assert submit(head, "python", "pipelines/unlearn.py", str(recipe), job="stopped-job", wait=False).returncode == 0
    deadline = time.monotonic() + 240
    while not steps_done(tmp_path / "runs") and time.monotonic() < deadline:
        time.sleep(0.05)
    ray("job", "stop", "stopped-job", environment=head)
    assert 0 < (reached := steps_done(tmp_path / "runs")) < 60
    assert "'stopped-job' was stopped" in ray("job", "status", "stopped-job", environment=head).stdout
    logs = ray("job", "logs", "stopped-job", environment=head).stdout
    assert "SIGTERM: stopping after this step, with a checkpoint" in logs
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    [run] = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    done = submit(head, "python", "pipelines/unlearn.py", str(recipe), job="main-job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ray("job", "status", "main-job", environment=head).stdout.count("succeeded") == 1
    logs = ray("job", "logs", "main-job", environment=head).stdout
    assert "gates hold" in logs
    assert f"going on after step {reached}" in logs
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    ours = logs[logs.index("run          ") :].rstrip().splitlines()
    assert len(ours) < 80
    noise = [line for line in logs.splitlines() if "WARNING" in line or "INFO worker" in line or "pid=" in line]
    assert len(noise) <= 2, noise
    [folder] = (tmp_path / "runs").glob("gradient-ascent*")
    assert (folder / "model" / "model.safetensors").exists()
