"""What tests share: a small world (people, tokenizer, model) and one Ray cluster for all that need it."""

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_BACKEND_LOG_LEVEL="fatal",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S="60",
    RAY_DATA_LOG_LEVEL="ERROR",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from components.config import AdamW, Data, Nll, Objective, People, Scratch, Train
from components.data import locations
from components.data.mapping import row_texts
from components.data.prepare import Prepared, prepare
from components.data.rows import PreparedRows
from components.data.tokenise import ROWS
from components.files import read_lines, write_arrow
from components.models import fingerprint, load_tokenizer, make_scratch, quiet_libraries, tokenizer_facts
from components.training.job import Job
from components.training.launch import run_job
from components.training.reference import needs, reference_pass
from tests.training import OBJECTIVE, SOUL, TRAIN

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def people(split: str, **mapping: Any) -> People:
    return People(type="people", split=split, people=16, forget_people=3, holdout_people=2, **mapping)


DATA = Data(forget=[people("forget")], normal=[people("normal")], random=[people("normal")], max_tokens=96)


def write_rows(folder: Path, ids: list[list[int]], starts: list[int], shard: int = 4) -> PreparedRows:
    """A prepared folder as `prepare` would write it, in files of `shard` rows."""
    (folder / "rows").mkdir(parents=True)
    names = []
    for first in range(0, len(ids), shard):
        rows = [
            {"row_id": str(i), "match": i, "line": i + 1, "input_ids": ids[i], "answer_start": starts[i]}
            for i in range(first, min(first + shard, len(ids)))
        ]
        names.append([f"000-000000-{first // shard:06d}", len(rows)])
        write_arrow(pa.Table.from_pylist(rows, schema=ROWS), folder / "rows" / f"{names[-1][0]}.arrow")
    summary = {
        "shards": names, "good": len(ids), "bad": 0, "filtered": 0, "reasons": {}, "tokens": sum(map(len, ids)),
        "longest_prompt": max(starts), "longest_answer": max(len(i) - s for i, s in zip(ids, starts, strict=True)),
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return PreparedRows(folder)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cluster_address(ray_cluster: None) -> str:
    """For whole commands that need not start Ray themselves: it takes some seconds each time."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def base(storage: Path) -> Path:
    """A random Llama of 2 layers with a tokenizer trained on the people's text."""
    texts = [text for source in (*DATA.forget, *DATA.normal) for row in row_texts(source) for text in row]
    scratch = Scratch(type="scratch", vocabulary=400, hidden_size=32, layers=2, heads=2, context=128)
    return make_scratch(scratch, texts, 0, storage)


@pytest.fixture(scope="session")
def streams(ray_cluster: None, base: Path, storage: Path) -> dict[str, Prepared]:
    facts = tokenizer_facts(load_tokenizer(base))
    return {
        "forget": prepare(DATA.forget, "pairs", DATA, facts, storage),
        "normal": prepare(DATA.normal, "pairs", DATA, facts, storage),
        "random": prepare(DATA.random, "answers", DATA, facts, storage),
    }


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server of our own, reached as its users reach theirs: by the environment."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    locations._connect.cache_clear()
    store = fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True)
    store.create_dir("bucket")
    yield store
    server.stop()
    locations._connect.cache_clear()


@pytest.fixture(scope="session")
def original(base: Path, streams: dict[str, Prepared], storage: Path) -> Path:
    """The base model after a few steps on the people's facts."""
    output = storage / "original"
    job = Job(
        model=str(base), output=str(output), metrics=str(storage / "original.jsonl"),
        normal=str(streams["normal"].folder), objective=Objective(normal=Nll(type="nll")),
        optimizer=AdamW(type="adamw", lr=3e-3),
        train=Train(workers=0, zero_stage=0, batch_size=16, micro_batch_size=16, steps=60), seed=0,
    )  # fmt: skip
    run_job(job, storage)
    losses = [line["train/normal_loss"] for line in read_lines(storage / "original.jsonl")]
    assert losses[-1] < 0.5 * losses[0]
    return output


@pytest.fixture
def make_job(original: Path, streams: dict[str, Prepared], storage: Path, tmp_path: Path):
    def make(name: str, train: Train = TRAIN, **changes) -> Job:
        settings = {
            "model": str(original), "output": str(tmp_path / name), "metrics": str(tmp_path / f"{name}.jsonl"),
            "objective": OBJECTIVE, "optimizer": SOUL, "train": train,
            "seed": 5, **{stream: str(prepared.folder) for stream, prepared in streams.items()},
        }  # fmt: skip
        job = Job(**{**settings, **changes})
        here = job.model_copy(update={"train": job.train.model_copy(update={"workers": 0})})
        reference = {
            group: str(reference_pass(here, group, what, fingerprint(original), storage))
            for group, what in needs(job.objective).items()
        }
        return job.model_copy(update={"reference": reference})

    return make
