"""Everything that reserves GPUs, walked with logical ones: Ray counts two, torch computes on the CPU.

Scheduling, placement and the order of results are those of a machine with GPUs; arithmetic on GPUs is not tested here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from components.files import read_lines
from components.models import load_tokenizer
from tests.test_pipelines import ROOT, SMALL, command
from tests.test_tuning_trials import SPACE

pytestmark = pytest.mark.slow

_CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster with 4 CPUs and 2 logical GPUs, beside the one that other tests share."""
    head = subprocess.Popen([sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    head.communicate(timeout=60)


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random judge."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    names = {0: "fine", 1: "harmful"}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, id2label=names, label2id={name: i for i, name in names.items()}
    )
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, in which all that may reserve a GPU does, and a classifier judges the answers."""
    folder = tmp_path_factory.mktemp("gpus")
    judge = {"type": "classifier", "path": str(classifier), "label": "harmful"}
    finetune = {**SMALL["finetune"], "train": {**SMALL["finetune"]["train"], "workers": 1, "gpus_per_worker": 1}}
    changed = {
        "finetune": finetune, "train": {**SMALL["train"], "gpus_per_worker": 1},
        "evaluation": {**SMALL["evaluation"], "judge": judge},
    }  # fmt: skip
    attacks = {"relearn": {"steps": [2]}, "bits": [], "prefixes": {}}
    file = folder / "gpus.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changed, "attacks": attacks, "storage": str(folder / "runs")}))
    return file


def run_of(recipe: Path, storage: str, address: str, *changes: str) -> Path:
    """The folder of the main job's run."""
    folder = recipe.parent / storage
    done = command("unlearn", str(recipe), f"storage={folder}", *changes, RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert ("Ray reserved GPUs, but torch sees none" in done.stdout) == (not changes)
    [run] = folder.glob("gradient-ascent*")
    return run


@pytest.fixture(scope="module")
def run_folder(recipe: Path, address: str) -> Path:
    return run_of(recipe, "runs", address)


def test_a_run_on_logical_gpus(run_folder: Path) -> None:
    """Preparing, fine-tuning, scoring, judging, the reference pass, two workers of ZeRO-3, the report."""
    models = json.loads((run_folder / "metrics.json").read_text())["models"]
    assert {*models} == {"original", "unlearned", "retain-only"}
    assert all(0 <= about["values"]["forget_harmful"] <= 1 for about in models.values())
    assert len(read_lines(run_folder / "metrics.jsonl")) == SMALL["train"]["steps"]
    assert "forget_harmful" in (run_folder / "report.html").read_text()


@pytest.mark.long
def test_a_run_on_logical_gpus_is_that_on_cpus(run_folder: Path, recipe: Path, address: str) -> None:
    shutil.copytree(recipe.parent / "runs" / "models", recipe.parent / "cpus" / "models")  # those need no other try
    other = run_of(recipe, "cpus", address, "train.gpus_per_worker=0", "finetune.train.gpus_per_worker=0")
    found = [json.loads((folder / "metrics.json").read_text())["models"] for folder in (run_folder, other)]
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_attacks_on_logical_gpus(run_folder: Path, recipe: Path, address: str) -> None:
    done = command("attack", str(recipe), str(run_folder / "model"), "train.workers=1", RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert "relearn 20%, 2 steps" in done.stdout


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_sweep_on_logical_gpus(run_folder: Path, recipe: Path, address: str, workers: int) -> None:
    """Trials of one process that hold a GPU each, and trials of two workers that take turns with both."""
    space = recipe.with_name(f"space{workers}.yaml")
    settings = {**SPACE["settings"], "train.workers": workers}
    space.write_text(yaml.safe_dump({**SPACE, "settings": settings, "search": {"trials": 2}}, sort_keys=False))
    done = command("tune", str(recipe), str(space), RAY_ADDRESS=address)
    assert done.returncode == 0, done.stdout + done.stderr
    [sweep] = (recipe.parent / "runs" / "sweeps").glob(f"{space.stem}-small-*")
    results = [json.loads(file.read_text())["state"] for file in sweep.glob("*/result.json")]
    assert results == ["finished"] * 2, done.stdout


_BATCHES = """
import sys, numpy, ray, pyarrow as pa
from components.batch_inference import map_batches, run_parts
from components.config import Train

def make(offset):
    return lambda rows: pa.table({
        "y": [2 * x + offset for x in rows["x"].to_pylist()], "first": [rows["x"][0].as_py()] * len(rows),
    })

class Square:
    def __call__(self, part):
        return part ** 2

def of(**train):
    rows = pa.table({"x": list(range(count))})
    lengths = [x % 11 for x in range(count)]
    return map_batches(rows, make, (5,), lengths=lengths, batch_size=size, train=Train(**train))

ray.init(log_to_driver=False)
for count, size in [(1, 8), (7, 3), (500, 7)]:
    here = of(workers=0)
    assert here["y"].to_pylist() == [2 * x + 5 for x in range(count)]
    assert of(workers=2, gpus_per_worker=1).equals(here), (count, size)
    assert of(workers=1).equals(here), (count, size)
assert sorted(run_parts(9, Square, (), Train(workers=2, gpus_per_worker=1))) == [i ** 2 for i in range(9)]
"""


def test_batches_stay_whole(address: str) -> None:
    """Whatever Ray Data makes of blocks, each call gets the batch that it gets without Ray."""
    done = subprocess.run(
        [sys.executable, "-c", _BATCHES], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
