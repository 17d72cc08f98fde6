"""What SOUL costs against AdamW: a curvature refresh in steps, and a whole step at k = 10, on two processes.

    python -m tests.speed        (make bench-train)

The two optimizers take turns in the same run, so that what else the machine does hits both; medians are compared.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.config import AdamW, Objective, Soul, Train
from components.console import table
from components.models import fingerprint, quiet_libraries
from components.training.curvature import refresh_curvature
from components.training.engine import optimizer_step
from components.training.job import Job
from components.training.loop import set_up
from components.training.reference import reference_pass
from components.training.step import objective_backward, step_of
from tests.training import join, leave

RANKS, ROUNDS, INTERVAL = 2, 15, 10
ROWS, PROMPT, ANSWER, VOCABULARY = 48, 64, 64, 4096
OBJECTIVE = Objective.model_validate(
    {
        "forget": {"type": "gradient_ascent", "weight": 0.1},
        "random": {"type": "random_response"},
        "normal": {"type": "kl_to_original"},
    }
)


def make_job(folder: Path, stage: int) -> Job:
    """5 M parameters, sequences of 128 tokens, 8 rows of each set a step and rank."""
    from tests.conftest import write_rows

    model = folder / "model"
    if not model.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(model)
        rng = np.random.default_rng(0)
        for name in ("forget", "normal", "random"):
            start = 0 if name == "random" else PROMPT
            ids = rng.integers(3, VOCABULARY, (ROWS, start + ANSWER)).tolist()
            write_rows(folder / "prepared" / name, ids, [start] * ROWS, shard=ROWS)
    train = Train(workers=0, zero_stage=stage, batch_size=8 * RANKS, micro_batch_size=8, steps=3)
    job = Job(
        model=str(model), output=str(folder / "output"), metrics=str(folder / "metrics"),
        **{name: str(folder / "prepared" / name) for name in ("forget", "normal", "random")},
        objective=OBJECTIVE, optimizer=Soul(type="soul", hessian_interval=INTERVAL), train=train, seed=0,
    )  # fmt: skip
    reference = reference_pass(job, "normal", "hidden", fingerprint(model), folder)
    return job.model_copy(update={"reference": {"normal": str(reference)}})


def measure(rank: int, folder: str) -> None:
    """One of the two processes; rank 0 writes the median seconds of each part."""
    quiet_libraries()
    join(rank, folder, RANKS)
    found = {}
    for stage in (0, 3):
        job = Job.model_validate_json(Path(folder, f"job-{stage}.json").read_text())
        adamw = job.model_copy(update={"optimizer": AdamW(type="adamw")})
        ready = {name: set_up(j, rank, RANKS, torch.device("cpu"))[0] for name, j in (("soul", job), ("adamw", adamw))}
        seconds: dict[str, list[float]] = {"adamw": [], "soul": [], "refresh": []}
        for turn in range(ROUNDS + 2):
            for name in seconds:
                setup = ready["soul" if name == "refresh" else name]
                step = step_of(setup, turn % 3)
                torch.distributed.barrier()
                started = time.perf_counter()
                if name == "refresh":
                    refresh_curvature(setup, step, WEIGHTS)
                else:
                    objective_backward(setup, step, WEIGHTS)
                    optimizer_step(setup.engine)
                torch.distributed.barrier()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - started)
        found[stage] = {name: statistics.median(values) for name, values in seconds.items()}
        for setup in ready.values():
            setup.engine.destroy()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    leave()


WEIGHTS = {"forget": 0.1, "random": 1.0, "normal": 1.0}


def main() -> None:
    """Run both processes and print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in (0, 3):
            Path(folder, f"job-{stage}.json").write_text(make_job(Path(folder), stage).model_dump_json())
        torch.multiprocessing.spawn(measure, (folder,), nprocs=RANKS)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    rows = []
    for stage, t in found.items():
        whole = t["soul"] + t["refresh"] / INTERVAL
        rows.append(
            [f"ZeRO-{stage}", *(f"{1000 * t[name]:.0f}" for name in ("adamw", "soul", "refresh")),
             f"{t['refresh'] / t['soul']:.2f}", f"{whole / t['adamw']:.2f}"]
        )  # fmt: skip
    header = ["", "AdamW step, ms", "SOUL step, ms", "refresh, ms", "refresh / step", f"SOUL at k={INTERVAL} / AdamW"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
