"""What a job says on a cluster whose nodes do not all see its storage folder.

    python -m tests.blind_nodes JOB.json STORAGE

Three nodes beside the driver's: on one the folder is empty, on one it cannot be written, on one its parent is another.
Prints a JSON object with the text of each error.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from components.cluster import check_sees
from components.data.prepare import prepare
from components.errors import ClusterError
from components.models import load_tokenizer, tokenizer_facts
from components.training.job import Job
from components.training.launch import run_job
from tests.conftest import DATA

VIEWS = (
    "mount -t tmpfs tmpfs {storage}",
    "mount --bind {storage} {storage} && mount -o remount,bind,ro {storage}",
    "mount -t tmpfs tmpfs {parent}",
)


def main(job: Job, storage: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    start = f"exec {Path(sys.executable).parent}/ray start --address={cluster.address} --num-cpus=1 --block"
    ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
    nodes = []
    for view in VIEWS:  # one after the other: several that start at once take each other's ports
        shell = f"{view.format(storage=storage, parent=storage.parent)} && {start}"
        nodes.append(subprocess.Popen(["unshare", "-m", "sh", "-c", shell], stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < 1 + len(nodes):
            assert nodes[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    facts = tokenizer_facts(load_tokenizer(Path(job.model)))
    tried: dict[str, Callable[[], object]] = {
        "check": lambda: check_sees(storage),
        "prepare": lambda: prepare(DATA.forget, "pairs", DATA.model_copy(update={"max_tokens": 95}), facts, storage),
        "train": lambda: run_job(job, storage),
    }
    told = {}
    for name, act in tried.items():
        try:
            act()
            told[name] = "nothing"
        except ClusterError as error:
            told[name] = str(error)
    ids = [node["NodeID"][:8] for node in ray.nodes() if node["Resources"].get("CPU")]
    print(json.dumps({"told": told, "ids": ids}), flush=True)
    for node in nodes:
        node.terminate()
    os._exit(0)


if __name__ == "__main__":
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_BACKEND_LOG_LEVEL="fatal", RAY_CHDIR_TO_TRIAL_DIR="0")
    os.environ.update(RAY_DATA_LOG_LEVEL="CRITICAL", RAY_DATA_DISABLE_PROGRESS_BARS="1")
    main(Job.model_validate(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
