"""What is said of workers and nodes that end, by what Ray and its libraries raise then."""

import errno
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from components import cluster
from components.batch_inference import map_batches, run_parts
from components.config import Train
from components.errors import ClusterError, DataError, ModelError, StorageError, TrainingError, UnlearnError, stall_told
from components.files import write_arrow
from components.training import launch

LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.3]:30925. GLHF! 🏖️",
    "[../gloo/transport/tcp/pair.cc:544] Read error [10.0.0.3]:1: Connection reset by peer. GLHF!",
    "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error",
    "Application timeout caused pair closure. This may indicate a remote worker that hangs. gloo",
]
ENDS = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.NodeDiedError("Task failed because its node 5ab3 died"),
    ray.exceptions.WorkerCrashedError(),
    ray.exceptions.LocalRayletDiedError(),
    ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory"),
]


def node(name: str, alive: bool = True, port: int = 1, why: str = "") -> dict[str, Any]:
    return {
        "NodeID": name * 8, "Alive": alive, "NodeManagerAddress": "127.0.0.1", "NodeManagerHostname": f"host-{name}",
        "NodeManagerPort": port, "DeathReasonMessage": why, "Resources": {"CPU": 1.0},
    }  # fmt: skip


@pytest.mark.parametrize("text", LOST)
def test_the_end_of_a_worker_is_told_and_not_its_peers_lost_connection(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "losses", lambda before: "Died meanwhile: node 10.0.0.3.")
    for end in ENDS:
        raised = launch._worker_error(group(RuntimeError(text), WorkerHealthCheckFailedError("x", end)), set())
        assert isinstance(raised, launch.WorkersDied)
        assert " ".join(str(end).split())[:40] in str(raised)
        assert "GLHF" not in str(raised)
        assert str(raised).endswith("Died meanwhile: node 10.0.0.3.")
    alone = str(launch._worker_error(group(RuntimeError(f"Traceback\n{text}")), set()))
    assert "it lost the connection to another one, whose process or machine ended" in alone
    assert "GLHF" not in alone


def group(*failures: Exception) -> Exception:
    error = Exception("Training failed due to worker errors")
    error.worker_failures = dict(enumerate(failures))  # type: ignore[attr-defined]
    return error


def test_what_a_worker_raised_is_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "losses", lambda before: "")
    own = DataError("Rows are bad.")
    assert launch._worker_error(group(RuntimeError(LOST[0]), own), set()) is own
    text = str(launch._worker_error(group(ValueError("Traceback\nValueError: no such layer.")), set()))
    assert text.startswith("A training worker failed: ValueError: no such layer. Run again with --debug")


def test_nodes_that_died_are_named_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of which Ray does not know yet; not those that were dead before, nor a single machine's."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        nodes = [node("a", port=port), node("b"), node("c", alive=False, why="preempted"), node("d", alive=False)]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        told = cluster.losses({"a" * 8, "b" * 8, "c" * 8})
    assert "host-b, id bbbbbbbb): it does not answer" in told
    assert "host-c, id cccccccc): preempted" in told
    assert "host-a" not in told
    assert "host-d" not in told
    assert cluster.losses({"b" * 8}) == ""
    assert cluster.losses({"a" * 8, "e" * 8}) != told


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_what_ends_rays_tasks_is_our_error(end: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "living", set)
    monkeypatch.setattr(cluster, "losses", lambda before: "Died meanwhile: node 10.0.0.3.")
    expected = r"Scoring lost a process .* Died meanwhile: node 10\.0\.0\.3\.$"
    with pytest.raises(ClusterError, match=expected) as told, stall_told("Scoring", 300):
        raise end
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [ClusterError, DataError, StorageError])
def test_our_error_of_an_actor_that_could_not_start_is_found(
    kind: type[UnlearnError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps only its traceback's text."""
    monkeypatch.setattr(cluster, "living", set)
    try:
        raise kind("Model cannot be loaded (path=/x): it is torn. Load another.")
    except kind as error:
        task = ray.exceptions.RayTaskError("_Worker.__init__", traceback.format_exc(), error, ip="127.0.0.1")
    with pytest.raises(kind) as raised, stall_told("Scoring", 300):
        raise ray.exceptions.ActorDiedError.from_task_error(task)
    assert str(raised.value) == "Model cannot be loaded (path=/x): it is torn. Load another."


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ESTALE, errno.ENOTCONN, errno.EROFS, errno.EIO])
def test_a_file_that_a_worker_cannot_use_is_told_with_its_node(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_here", lambda: "10.0.0.3 (gpu-3, id 5ab3)")
    with (
        pytest.raises(ClusterError, match=r"Node 10\.0\.0\.3 \(gpu-3.* cannot use /nfs/summary\.json: ") as told,
        cluster.node_told(),
    ):
        raise OSError(number, os.strerror(number), "/nfs/summary.json")
    assert os.strerror(number) in str(told.value)
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)


def test_so_is_one_that_pyarrow_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors have no file name, only a text."""
    monkeypatch.setattr(cluster, "_here", lambda: "10.0.0.3 (gpu-3, id 5ab3)")
    with pytest.raises(ClusterError, match=r"Node 10\.0\.0\.3 .*nowhere.* No such file") as told, cluster.node_told():
        write_arrow(pa.table({"x": [1]}), tmp_path / "nowhere" / "x.arrow")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "error",
    [
        StorageError("Model cannot be written."),
        OSError(errno.ENOSPC, "No space left", "/x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TrainingError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_of_a_worker_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, cluster.node_told():
        raise error
    assert raised.value is error


def test_one_node_alone_is_not_asked(tmp_path: Path, ray_cluster: None) -> None:
    cluster.check_sees(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("when", ["made", "called", "file"])
@pytest.mark.parametrize("pass_over", ["batches", "parts"])
def test_errors_of_ray_datas_workers_arrive_as_they_were_raised(ray_cluster: None, pass_over: str, when: str) -> None:

    class Fails:  # here, so that it travels by value: no module of tests is on the workers' path
        def __init__(self, when: str):
            self.when = when
            if when == "made":
                raise ModelError("Model cannot be loaded (path=/x). Load another.")

        def __call__(self, given: Any) -> Any:
            if self.when == "file":
                Path("/nowhere/summary.json").read_text(encoding="utf-8")
            raise ModelError("Model cannot be loaded (path=/x). Load another.")

    train = Train(workers=1, cpus_per_worker=1)
    kind, told = (ClusterError, "cannot use /nowhere/summary.json") if when == "file" else (ModelError, "Load another.")
    passes: dict[str, Callable[[], Any]] = {
        "batches": lambda: map_batches(pa.table({"x": [1]}), Fails, (when,), lengths=[1], batch_size=1, train=train),
        "parts": lambda: list(run_parts(2, Fails, (when,), train)),
    }
    with pytest.raises(kind) as raised:
        passes[pass_over]()
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
