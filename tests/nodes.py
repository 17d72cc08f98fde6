"""Run a training job on a cluster of three nodes on this machine, and let one that trains go.

python -m tests.nodes JOB.json kill     # its processes die, without a word
python -m tests.nodes JOB.json drain    # it says that it will be gone in 8 seconds, then is
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from components.training.job import Job


def run(job: Job, how: str, scratch: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from components.training.launch import run_job

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=40)

    def go() -> None:
        metrics = Path(job.metrics)
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 9:
            time.sleep(0.01)
        node = next(node for node in nodes if trains(node))
        if how == "kill":
            cluster.remove_node(node, allow_graceful=False)
        else:
            subprocess.run(
                [Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address, "--node-id",
                 node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                 "--deadline-remaining-seconds", "8"],
                check=True, capture_output=True,
            )  # fmt: skip

    threading.Thread(target=go, daemon=True).start()
    run_job(job, scratch)
    print(json.dumps({"nodes": sum(node["Alive"] for node in ray.nodes())}))
    ray.shutdown()
    cluster.shutdown()


def trains(node: Any) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))


if __name__ == "__main__":
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_BACKEND_LOG_LEVEL="fatal", RAY_CHDIR_TO_TRIAL_DIR="0")
    os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "12"  # the first try may still count on the dead node
    file = Path(sys.argv[1])
    run(Job.model_validate(json.loads(file.read_text())), sys.argv[2], file.parent)
