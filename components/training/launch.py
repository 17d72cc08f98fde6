"""A training job, in this process (`workers: 0`) or on Ray Train: start it, replace workers that die, stop it."""

import gc
import itertools
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from components.batch_inference import hide_gpus
from components.cluster import end_of, living, losses, node_told
from components.errors import ClusterError, Stopped, TrainingError, own_error
from components.process import REQUEST, is_request, keep_private
from components.training.job import Job, note

_NODE_PATIENCE = 600.0  # seconds that a run waits for the cluster to replace a node


def run_job(job: Job, scratch: Path) -> dict[str, Any]:
    """Run `job` to its end and return what rank 0's loop returned. `scratch` is for Ray Train's own files.

    Workers that die are replaced up to `train.max_failures` times; the new ones go on from the newest checkpoint.
    Ctrl-C and SIGTERM make it stop after the present step, with a checkpoint; a second request, some seconds later,
    stops it at once. All of that stands in `job.events`.

    `signal` in what is returned is the number of one that came too late to stop anything, else None.

    Raises:
        Stopped: after a signal, when the checkpoint is written.
        ClusterError: when the cluster is smaller than asked for.
        TrainingError, DataError, ModelError: as the loop raised it, or when workers died too often.
    """
    if job.stop:
        Path(job.stop).unlink(missing_ok=True)
    with _signals_stop(job) as caught:
        outcome = _attempts(job, scratch, caught)
    if outcome["stopped"]:
        number = caught[0] if caught else signal.SIGTERM
        raise Stopped(f"Stopped after step {outcome['steps']}; the same command goes on from there.", number)
    return {**outcome, "signal": caught[0] if caught else None}


def _attempts(job: Job, scratch: Path, caught: list[int]) -> dict[str, Any]:
    if job.train.workers == 0:
        return _run_here(job)
    for attempt in itertools.count(1):
        try:
            return _run_on_ray(job, scratch)
        except WorkersDied as died:
            if attempt > job.train.max_failures:
                raise died.told from died
            note(job, "failure", f"{died.told} Attempt {attempt + 1} of {job.train.max_failures + 1}", attempt=attempt)
            _await_cluster(job, caught)
    raise AssertionError


class WorkersDied(Exception):
    """Workers ended without an error of ours."""

    def __init__(self, told: TrainingError):
        super().__init__(str(told))
        self.told = told


@contextmanager
def _signals_stop(job: Job) -> Iterator[list[int]]:
    """Inside, the first request to stop makes the file `job.stop`, the second raises. Yields their signals."""
    caught: list[int] = []
    if job.stop is None or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def stop(number: int, frame: Any) -> None:
        if not is_request():
            return
        caught.append(number)
        if len(caught) > 1:
            raise Stopped("Stopped at once; what was done since the last checkpoint is lost.", number)
        Path(job.stop or "").touch()
        name = signal.Signals(number).name
        again = f"another one after {REQUEST:g} s stops at once"
        note(job, "stop", f"{name}: stopping after this step, with a checkpoint; {again}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_here(job: Job) -> dict[str, Any]:
    import torch

    from components.models import inference_device
    from components.training.loop import train_loop
    from components.training.system import watched

    if not torch.distributed.is_initialized():  # kept for later jobs: DeepSpeed holds on to the first group
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it, whoever started the process group
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.freeze()  # libraries are not walked over again by those who collect later: DeepSpeed, and this function's end
    try:
        with watched(job.system, 0):
            return train_loop(job, rank=0, world=1, device=inference_device())
    finally:  # this process goes on: give the model's memory back
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run_on_ray(job: Job, scratch: Path) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from components.training.process_group import ProcessGroup

    check_cluster(job.train.workers, job.train.cpus_per_worker, job.train.gpus_per_worker)
    before = living()
    resources = {"CPU": job.train.cpus_per_worker}
    if job.train.gpus_per_worker:
        resources["GPU"] = job.train.gpus_per_worker
    # A fresh name: under a known one Ray Train would silently go on from what it finds there.
    name = f"ray-train-{uuid.uuid4().hex[:8]}"
    trainer: Any = TorchTrainer(
        cast(Any, _worker),
        train_loop_config={"job": job.model_dump(mode="json")},
        torch_config=ProcessGroup(timeout_s=int(max(1, job.train.timeout))),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers, use_gpu=job.train.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return _in_thread(trainer.fit).return_value
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise _worker_error(error, before) from error
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)


def _in_thread(call: Callable[[], Any]) -> Any:
    """`call()`, made where Ray Train does not put its own hand on Ctrl-C, while this thread takes signals."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]
    return found[0]


def _await_cluster(job: Job, caught: list[int]) -> None:
    """Wait for the nodes that the job needs: after one died, its successor may take minutes to come.

    Raises:
        Stopped: when a signal was caught.
        ClusterError: when they do not come.
    """
    deadline = time.monotonic() + _NODE_PATIENCE
    while True:
        if caught:
            raise Stopped("Stopped between two attempts; the same command goes on from the checkpoint.", caught[0])
        try:
            check_cluster(job.train.workers, job.train.cpus_per_worker, job.train.gpus_per_worker)
            return
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def check_cluster(workers: int, cpus: float, gpus: float) -> None:
    """Ray itself would wait for ever for what it has not.

    Raises:
        ClusterError: when the cluster's nodes together have fewer CPUs or GPUs.
    """
    import ray

    have = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if workers * each > have.get(kind, 0):
            raise ClusterError(
                f"Cluster is too small (train.workers={workers}, {kind}s needed={workers * each:g}, "
                f"{kind}s there={have.get(kind, 0):g}). Expected enough for all workers at once. Lower train.workers "
                f"or train.{kind.lower()}s_per_worker, or add nodes."
            )


@node_told()
def _worker(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train
    import ray.train.torch
    import torch

    from components.training.loop import train_loop
    from components.training.system import watched

    keep_private()
    job = Job.model_validate(config["job"])
    context = ray.train.get_context()
    device = torch.device("cpu")
    if not job.train.gpus_per_worker:
        hide_gpus()
    elif torch.cuda.is_available():
        device = ray.train.torch.get_device()
    elif context.get_world_rank() == 0:
        note(job, "device", "Ray reserved GPUs, but torch sees none: training on CPUs")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    if job.group and context.get_world_rank() == 0 and (group := ray.util.get_current_placement_group()):
        Path(job.group).write_text(group.id.hex(), encoding="utf-8")
    with watched(job.system if context.get_local_rank() == 0 else None, context.get_node_rank()):
        return train_loop(job, context.get_world_rank(), context.get_world_size(), device, notice=_nodes_about_to_go)


def _nodes_about_to_go() -> tuple[str, ...]:
    import ray.train

    info = ray.train.get_preemption_info()
    return tuple(info.preempted_node_ids) if info else ()


def _worker_error(error: Any, before: set[str]) -> Exception:
    """Our own error out of Ray's collection of one exception per rank, else what ended the first of the workers.

    `before` are the nodes that lived when they began.
    """
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        if own := own_error(failure):
            return own
    gone = [found for found in map(_end_of, failures) if found is not None]
    line = end_of(gone[0]) if gone else (str(failures[0]).strip().splitlines() or [type(failures[0]).__name__])[-1]
    if not gone and any(word in line for word in _OF_ANOTHER):
        line = "it lost the connection to another one, whose process or machine ended"
    advice = losses(before) or (
        "Run again with --debug for its traceback, or with train.workers=0 to see it in this process."
    )
    return WorkersDied(TrainingError(f"A training worker failed: {line.rstrip('.:')}. {advice}"))


_OF_ANOTHER = ("by peer", "GLHF", "gloo", "NCCL", "remote process")
"""By which those that outlive a worker can be told: they are the first to know, but not why."""


def _end_of(failure: Any) -> BaseException | None:
    """What Ray says of a worker whose process is gone, with its machine or without; None where it raised something."""
    import ray

    found = getattr(failure, "health_check_failure", failure)
    ended = isinstance(found, ray.exceptions.RayError) and not isinstance(found, ray.exceptions.RayTaskError)
    return found if ended else None
