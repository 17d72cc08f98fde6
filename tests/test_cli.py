import copy
import errno
import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.errors import (
    BadNumbers,
    ClusterError,
    ConfigError,
    DataError,
    ModelError,
    Stopped,
    StorageError,
    TrackingError,
    TrainingError,
    UnlearnError,
    own_error,
)
from components.files import only_one
from components.load_config import load_recipe
from pipelines import cli
from pipelines.cli import Command, exit_code, ray_session, run_cli, storage_folder

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "pipelines" / "recipes" / "demo.yaml")


def test_storage_is_absolute_and_never_in_a_jobs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert storage_folder(load_recipe([DEMO])) == tmp_path / "runs"
    job = tmp_path / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert storage_folder(load_recipe([DEMO])) == tmp_path / "home" / "ray-unlearn" / "runs"
    assert storage_folder(load_recipe([DEMO], ["storage=/data/x"])) == Path("/data/x")


def run(error: Exception, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    def fail(command: Command) -> None:
        raise error

    return run_cli("d", fail, lambda command: "", argv=[DEMO, *flags]), capsys.readouterr().err


def test_our_error_is_found_inside_what_ray_makes_of_it(capsys: pytest.CaptureFixture) -> None:
    from ray.exceptions import RayTaskError

    inner = DataError("Data is bad. Expected good.")
    wrapped = RayTaskError("read", "Traceback ...", inner).as_instanceof_cause()
    assert own_error(wrapped) is inner
    assert run(wrapped, capsys) == (1, "DataError: Data is bad. Expected good.\n")


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, ModelError, ClusterError, TrainingError, BadNumbers, StorageError, TrackingError]
)
def test_nobody_adds_to_the_text_of_our_errors(kind: type[UnlearnError]) -> None:
    """As Ray Data does by `args`, before it pickles them."""
    error = kind("Two lines:\n  are ours.")
    error.args = (f"{error.args[0]}\nFailed to apply UDF transform after 1/1 attempts.",)
    for found in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is kind
        assert str(found) == "Two lines:\n  are ours."
        assert found.args == ("Two lines:\n  are ours.",)


def test_flags_may_stand_anywhere(capsys: pytest.CaptureFixture) -> None:
    seeds = []

    def plan(command: Command) -> str:
        seeds.append(command.recipe.seed)
        return ""

    assert run_cli("d", lambda command: None, plan, argv=[DEMO, "--dry-run", "seed=7"]) == 0
    assert seeds == [7]


def test_unexpected_errors_are_one_line_unless_debugged(capsys: pytest.CaptureFixture) -> None:
    code, text = run(RuntimeError("first line\nsecond line"), capsys)
    assert code == 1
    assert text == "Unexpected RuntimeError: first line Run again with --debug for the traceback.\n"
    with pytest.raises(RuntimeError):
        run(RuntimeError("x"), capsys, "--debug")


def test_exit_codes_of_ends_that_were_asked_for(capsys: pytest.CaptureFixture) -> None:
    def stop(error: BaseException) -> Callable[[], None]:
        def act() -> None:
            raise error

        return act

    assert exit_code(stop(KeyboardInterrupt()), debug=False) == 130
    assert exit_code(stop(Stopped("Stopped after step 3.", signal.SIGTERM)), debug=False) == 143
    assert exit_code(stop(SystemExit(int(signal.SIGTERM))), debug=False) == 143  # as Ray ends while it starts
    assert capsys.readouterr().err.split() == ["Stopped.", "Stopped", "after", "step", "3.", "Stopped."]
    with pytest.raises(SystemExit):
        exit_code(stop(SystemExit(3)), debug=False)


def test_a_full_disk_is_one_paragraph_with_its_place(capsys: pytest.CaptureFixture) -> None:
    def act() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")

    assert exit_code(act, debug=False) == 1
    told = capsys.readouterr().err
    assert told.startswith("StorageError: File cannot be written (path=/dev/full, bytes free=")
    assert "No space left on device" in told


def test_a_command_leaves_with_its_code_and_all_that_it_said() -> None:
    """Also where its output is a pipe, and where what libraries have registered for the end says something."""
    code = "import atexit; from pipelines.cli import leave; atexit.register(print, 'last'); print('said'); leave(3)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "said\nlast\n", "")


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ClusterError, match="being worked on already"), only_one(tmp_path):
        pass
    with only_one(tmp_path):  # free again
        pass
    assert not list(tmp_path.iterdir())


# --- Ray that cannot be reached or started ----------------------------------------------------------------------------

DEAD = """
import json, os, socket, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
from components.errors import ClusterError
from pipelines import cli

servers = []

class Silent(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: time.sleep(60))

def grpc_server(*handlers):
    server = grpc.server(ThreadPoolExecutor(), handlers=handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    servers.append(server)
    return f"127.0.0.1:{port}"

listens = socket.create_server(("127.0.0.1", 0))
web = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
threading.Thread(target=web.serve_forever, daemon=True).start()
SimpleHTTPRequestHandler.log_message = lambda *told: None
addresses = {
    "nothing listens": "127.0.0.1:1", "IPv6": "[::1]:1", "no such host": "nosuchhost.invalid:6379",
    "accepts, says nothing": "127.0.0.1:%d" % listens.getsockname()[1], "web server": "127.0.0.1:%d" % web.server_port,
    "a head that hangs": grpc_server(Silent()), "another gRPC server": grpc_server(), "no address": "garbage",
    "empty port": "localhost:", "dashboard": "http://127.0.0.1:8265",
}
for name, address in addresses.items():
    os.environ["RAY_ADDRESS"] = address
    cli._HEAD_PATIENCE = 20.0 if "gRPC" in name else 0.5
    began = time.monotonic()
    try:
        with cli.ray_session():
            raise AssertionError
    except ClusterError as error:
        print(json.dumps([name, address, str(error), time.monotonic() - began]), flush=True)
os._exit(0)
"""


def test_a_cluster_that_does_not_answer_is_our_error_within_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", DEAD], cwd=ROOT, capture_output=True, timeout=120)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 10, done.stderr
    for name, address, text, seconds in told:
        assert text.startswith(f"Cannot connect to the Ray cluster (RAY_ADDRESS={address}): "), name
        assert text.count("\n") == 0
        assert seconds < 15, name
    by_name = {name: text for name, _, text, _ in told}
    assert "nothing answers there within 0.5 s." in by_name["a head that hangs"]
    assert "what answers there is no head of Ray." in by_name["another gRPC server"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/ray"),
        OSError("AF_UNIX path length cannot exceed 107 bytes"),
        ValueError("The configured object store size exceeds /dev/shm"),
        PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"),
        AssertionError("no free port"),
        RuntimeError("Failed to start GCS\nmore"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_keeps_ray_from_starting_is_our_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = no_ray(monkeypatch, [error, error, error])
    with pytest.raises(ClusterError, match=r"Ray cannot be started on this machine: ") as caught, ray_session():
        pass
    assert str(error).splitlines()[0].rstrip(".") in str(caught.value)
    assert calls == ["local"]


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "The current node timed out during startup. This could happen because some of the raylet failed to startup.",
        "Timed out waiting for node info for node_id=abc.",
        "Timed out after 60 seconds while waiting for node to startup.",
    ],
)
def test_a_slow_start_of_ray_is_tried_again(failures: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = no_ray(monkeypatch, [Exception(text)] * failures)
    if failures == 3:
        with pytest.raises(ClusterError, match="imed out"), ray_session():
            pass
    else:
        with ray_session():
            pass
    assert calls == ["local"] * min(3, failures + 1)


def no_ray(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[str]:
    """Let `ray.init` raise these, one after the other, then start nothing. Returns the addresses of its calls."""
    import ray

    calls, left = [], list(errors)

    def init(address: str, **options: object) -> None:
        calls.append(address)
        if left:
            raise left.pop(0)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cli, "_signals_stop", lambda: None)
    return calls
