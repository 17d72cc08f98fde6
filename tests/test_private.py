"""Whatever Ray's workers write is for this account only, on a cluster that was started without a thought of that."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.batch_inference import map_batches, run_parts
from components.config import Train
from components.data.prepare import prepare
from components.models import load_tokenizer, tokenizer_facts
from components.training.launch import run_job
from pipelines.unlearn import _tell_readable
from tests.conftest import DATA
from tests.training import TRAIN


@pytest.fixture(autouse=True)
def _careless() -> Iterator[None]:
    """This process made the cluster, and hands its own on to workers."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def writer(folder: Path):
    """What makes a scorer that leaves a file behind; a closure, since workers cannot import this module."""

    def make():
        def score(given):
            folder.mkdir(exist_ok=True)
            (folder / "text").write_text("Brenro Grasham")
            return given

        return score

    return make


def prepared(folder: Path, base: Path, make_job) -> Path:
    return prepare(DATA.forget, "pairs", DATA, tokenizer_facts(load_tokenizer(base)), folder).folder / "rows"


def trained(folder: Path, base: Path, make_job) -> Path:
    job = make_job("trained", TRAIN.model_copy(update={"workers": 2, "steps": 2, "checkpoint_every": 1}))
    job = job.model_copy(update={"checkpoints": str(folder / "checkpoints")})
    run_job(job, folder)
    return Path(job.output)


def scored(folder: Path, base: Path, make_job) -> Path:
    rows = pa.table({"x": [1, 2]})
    map_batches(rows, writer(folder / "s"), (), lengths=np.array([1, 2]), batch_size=2, train=Train(workers=1))
    return folder / "s"


def passed_over(folder: Path, base: Path, make_job) -> Path:
    list(run_parts(2, writer(folder / "p"), (), Train(workers=1)))
    return folder / "p"


@pytest.mark.parametrize("work", [prepared, pytest.param(trained, marks=pytest.mark.slow), scored, passed_over])
def test_what_a_worker_writes_is_for_this_account_only(
    work, ray_cluster: None, base: Path, make_job, tmp_path: Path
) -> None:
    made = work(tmp_path, base, make_job)
    written = [place for place in made.rglob("*") if place.is_file()]
    assert written
    assert {str(place): oct(place.stat().st_mode & 0o777) for place in written if place.stat().st_mode & 0o077} == {}


@pytest.mark.parametrize(
    ("storage", "inside", "told"),
    [(0o755, 0o755, True), (0o750, 0o644, True), (0o701, 0o750, True), (0o700, 0o755, False), (0o755, 0o700, False)],
)
@pytest.mark.parametrize("name", ["prepared", "mlflow-artifacts", "evaluations"])
def test_texts_that_an_earlier_version_left_open_are_told(
    name: str, storage: int, inside: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name).chmod(inside)
    tmp_path.chmod(storage)
    _tell_readable(tmp_path)
    assert (f"chmod -R go= {tmp_path}" in capsys.readouterr().out) is told
