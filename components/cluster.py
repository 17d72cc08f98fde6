"""A Ray cluster's nodes: which see a folder, which died; and what to say of one that cannot do its part."""

import errno
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.errors import ClusterError, UnlearnError
from components.files import writing

_PATIENCE = 120.0  # seconds in which a node must have started a process and looked


def check_sees(folder: Path) -> None:
    """Raise unless every node that may run workers reads and writes what this one does in `folder`.

    Raises:
        ClusterError: naming the nodes that do not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and _works(node)]
    if not others:
        return
    mark = folder / f".seen-{uuid.uuid4().hex[:8]}"
    with writing("Storage", folder):
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(mark)
            ): node
            for node in others
        }
        answered, silent = ray.wait([*asked], num_returns=len(asked), timeout=_PATIENCE)
        problems = [f"{name_of(asked[task])} has not answered for {_PATIENCE:g} s" for task in silent]
        for task in answered:
            with suppress(ray.exceptions.TaskUnschedulableError):  # it left meanwhile, and will not be asked for work
                if problem := _answer(task):
                    problems.append(f"{name_of(asked[task])}: {problem}")
    finally:
        mark.unlink(missing_ok=True)
    if problems:
        raise ClusterError(
            f"Nodes do not share the storage folder (storage={folder}; {'; '.join(problems)}). Expected a folder that "
            "every node reads and writes, such as NFS mounted at the same path. Mount it there, or set storage to one."
        )


def _works(node: dict[str, Any]) -> bool:
    return bool(node["Resources"].get("CPU") or node["Resources"].get("GPU"))


def _look(mark: str) -> str:
    """On a node: what keeps it from reading or writing beside `mark`, nothing where all is well."""
    try:
        Path(mark).stat()
        own = Path(f"{mark}-{uuid.uuid4().hex[:8]}")
        own.touch()
        own.unlink()
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def _answer(task: Any) -> str:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:  # such as a module that is not installed there
        return f"{type(error.cause).__name__}: {error.cause}"


def name_of(node: dict[str, Any]) -> str:
    """Address, host and id of one of `ray.nodes()`, for messages."""
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}, id {node['NodeID'][:8]})"


def living() -> set[str]:
    """Ids of the nodes that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def losses(before: set[str]) -> str:
    """A sentence on the nodes of `before` that died since, empty where none did.

    Ray takes half a minute to notice that a node is gone, so that each is asked whether it still takes connections.
    """
    import ray

    told = []
    for node in ray.nodes() if len(before) > 1 else []:
        if node["NodeID"] in before and not node["Alive"]:
            told.append(f"{name_of(node)}: {node.get('DeathReasonMessage') or 'no reason known'}")
        elif node["NodeID"] in before and not _answers(node):
            told.append(f"{name_of(node)}: it does not answer")
    if not told:
        return ""
    return (
        f"Died meanwhile: {'; '.join(told)}. Most likely the machine was switched off, reclaimed or out of memory. "
        "Give the same command again when the cluster has enough nodes."
    )


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5):
            return True
    except OSError:
        return False


def end_of(error: BaseException) -> str:
    """What Ray knows of a process that ended, in a line."""
    return " ".join(str(error).split()).rpartition("Worker exit detail: ")[2].rstrip(".")[:300]


_UNSEEN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EIO)


@contextmanager
def node_told() -> Iterator[None]:
    """Inside a worker, turn an error about a file that is not there into one that names the node, which may not see it.

    Raises:
        ClusterError: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, UnlearnError) or error.errno not in _UNSEEN:
            raise
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)  # pyarrow's: all in the text
        raise ClusterError(
            f"Node {_here()} cannot use {told}. Expected the same files on every node. "
            "Mount the storage folder there at the same path, or set storage to a shared one; on a node that sees it, "
            "somebody removed the file meanwhile."
        ) from error


def _here() -> str:
    import ray

    found = ray.get_runtime_context().get_node_id()
    return f"{ray.util.get_node_ip_address()} ({socket.gethostname()}, id {found[:8]})"
