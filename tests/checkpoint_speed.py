"""What a checkpoint costs while training goes on, for a model of 100 million parameters, against writing it in one go.

python -m tests.checkpoint_speed        (make bench-checkpoint)
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.config import Nll, Objective, Soul, Train
from components.console import table
from components.models import quiet_libraries
from components.training.checkpoint import Course
from components.training.checkpoint_files import Place
from components.training.engine import optimizer_step
from components.training.job import Job
from components.training.loop import set_up
from components.training.saving import Saving
from components.training.step import objective_backward, step_of
from tests.conftest import write_rows
from tests.training import join

WEIGHTS = {"normal": 1.0}


def make_job(folder: Path) -> Job:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(3, 8192, (8, 48)).tolist()
    write_rows(folder / "normal", ids, [16] * 8, shard=8)
    return Job(
        model=str(folder / "model"), output=str(folder / "output"), metrics=str(folder / "metrics"),
        normal=str(folder / "normal"), objective=Objective(normal=Nll(type="nll")), optimizer=Soul(type="soul"),
        train=Train(workers=0, zero_stage=3, batch_size=4, micro_batch_size=4, steps=3), seed=0,
    )  # fmt: skip


def main() -> None:
    """Print seconds of a step, of the call that starts a checkpoint, and of writing one while nothing else is done."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        join(0, name, ranks=1)
        setup, _ = set_up(make_job(folder), 0, 1, torch.device("cpu"))
        saving = Saving(setup, Place(str(folder / "checkpoints")), "mark")

        def step(number: int) -> float:
            started = time.perf_counter()
            objective_backward(setup, step_of(setup, number % 2), WEIGHTS)
            optimizer_step(setup.engine)
            return time.perf_counter() - started

        def save(number: int) -> float:
            started = time.perf_counter()
            saving.save(Course(number, {}, {}), None)
            return time.perf_counter() - started

        plain = statistics.median([step(number) for number in range(12)][4:])
        first = save(0)
        saving.finish()
        whole, calls, extras = [], [], []
        for turn in range(1, 6):
            started = time.perf_counter()
            save(turn)
            saving.finish()
            whole.append(time.perf_counter() - started)
            calls.append(save(turn + 10))
            started, done = time.perf_counter(), 0
            while saving.writing():
                step(done)
                done += 1
            extras.append(time.perf_counter() - started - done * plain)
        parameters = sum(p.ds_numel for p in setup.engine.module.parameters())
        setup.engine.destroy()
    whole_, call, extra = (statistics.median(values) for values in (whole, calls, extras))
    rows = [
        ["step without a checkpoint", f"{plain:.2f} s", ""],
        ["written in one go (copy, write, fsync, sha256)", f"{whole_:.2f} s", "1"],
        ["stall of the first one (its memory is new)", f"{first:.2f} s", f"{first / whole_:.2f}"],
        ["stall of every other", f"{call:.2f} s", f"{call / whole_:.2f}"],
        ["slowdown of the steps beside it, summed", f"{extra:.2f} s", f"{extra / whole_:.2f}"],
    ]
    print(table([f"{parameters / 1e6:.0f} M parameters, SOUL, ZeRO-3, 1 thread", "seconds", "of one go"], rows))


if __name__ == "__main__":
    main()
