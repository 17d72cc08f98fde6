"""Run the training job that a JSON file describes, as a process of its own that tests may kill.

python -m tests.drive JOB.json             # on the Ray cluster at RAY_ADDRESS, or in this process (workers: 0)
python -m tests.drive JOB.json SECONDS     # on two ranks without Ray; each file of a checkpoint takes SECONDS
"""

import json
import os
import sys
import time
from pathlib import Path

from components.training.job import Job
from pipelines.cli import exit_code, ray_session


def one_of_two(rank: int, job_file: str, folder: str, seconds: float) -> None:
    import torch

    from components.training import checkpoint_files
    from components.training.loop import train_loop
    from tests.training import join, leave

    quick = checkpoint_files.sha256
    checkpoint_files.sha256 = lambda file: (time.sleep(seconds), quick(file))[1]  # type: ignore[func-returns-value]
    join(rank, folder)
    job = Job.model_validate(json.loads(Path(job_file).read_text()))
    train_loop(job, rank, 2, torch.device("cpu"))
    leave()


def on_two_ranks(job_file: Path, seconds: float = 0.0) -> None:
    import tempfile

    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (str(job_file), folder, seconds), nprocs=2)


def run(job_file: Path) -> None:
    from components.training.launch import run_job

    job = Job.model_validate(json.loads(job_file.read_text()))
    if job.train.workers:
        with ray_session():
            run_job(job, job_file.parent)
    else:
        run_job(job, job_file.parent)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = sys.argv[1:]
    if len(arguments) == 2:
        on_two_ranks(Path(arguments[0]), float(arguments[1]))
        sys.exit(0)
    sys.exit(exit_code(lambda: run(Path(arguments[0])), debug=False))
