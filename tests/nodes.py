"""Run a training job on a cluster of four nodes on this machine, and let two that train go, one after the other.

    python -m tests.nodes JOB.json

The first says that it will be gone in 8 seconds, and is; the processes of the second die without a word.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from components.training.job import Job
from tests.training import events, steps_done


def run(job: Job, scratch: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from components.training.launch import run_job

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=40)

    def go() -> None:
        await_(lambda: steps_done(job.metrics) >= 4)
        drained = next(node for node in nodes if trains(node))
        subprocess.run(
            [Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address, "--node-id",
             drained.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", "8"],
            check=True, capture_output=True,
        )  # fmt: skip
        await_(lambda: any(event["event"] == "resumed" for event in events(job)))
        before = steps_done(job.metrics)
        await_(lambda: steps_done(job.metrics) >= before + 2)
        killed = next(node for node in nodes if node is not drained and trains(node))
        cluster.remove_node(killed, allow_graceful=False)
        gone.append(killed.node_id)

    gone: list[str] = []
    threading.Thread(target=go, daemon=True).start()
    run_job(job, scratch)
    print(json.dumps({"nodes": sum(node["Alive"] for node in ray.nodes()), "killed": gone[0]}))
    ray.shutdown()
    cluster.shutdown()


def await_(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.02)


def trains(node: Any) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))


if __name__ == "__main__":
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_BACKEND_LOG_LEVEL="fatal", RAY_CHDIR_TO_TRIAL_DIR="0")
    os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "12"  # the first try may still count on the dead node
    file = Path(sys.argv[1])
    run(Job.model_validate(json.loads(file.read_text())), file.parent)
