import json
import threading
import time
from pathlib import Path

import pytest

from components.config import Gate
from components.errors import TrackingError
from components.files import write_whole
from components.load_config import load_recipe
from components.tracking import registry
from components.tracking.follow import follow
from components.tracking.gates import gate_table, judge
from components.tracking.run import log_lines, log_metrics, make_client, open_run

ROOT = Path(__file__).resolve().parents[1]


def test_gates() -> None:
    gates = [
        Gate(metric="a", min=0.5),
        Gate(metric="a", max=0.5),
        Gate(metric="b", min_of_original=0.9),
        Gate(metric="missing", min=0),
        Gate(metric="c", min_of_original=0.9),
    ]
    results = judge(gates, {"a": 0.5, "b": 0.89, "c": 1.0}, {"b": 1.0})
    assert [result.passed for result in results] == [True, True, False, False, False]
    text = gate_table(results)
    assert "not computed" in text
    assert text.count("FAIL") == 3


def test_follow_hands_over_every_whole_line_once(tmp_path: Path) -> None:
    file, seen = tmp_path / "m.jsonl", []
    with follow(file, seen.extend, interval=0.01) as failures:
        for i in range(20):
            with file.open("a") as stream:
                stream.write(f'{{"step": {i + 1}')
                stream.flush()
                time.sleep(0.01)  # the reader meets half a line
                stream.write("}\n")
    assert [line["step"] for line in seen] == list(range(1, 21))
    assert not failures


def test_follow_hands_over_steps_done_again_once(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint replaces the file by a shorter one."""
    file, seen = tmp_path / "m.jsonl", []
    lines = [json.dumps({"step": i}) + "\n" for i in range(1, 13)]
    with follow(file, seen.extend, interval=0.01, after=2):
        file.write_text("".join(lines[:8]))
        time.sleep(0.1)
        write_whole(file, "".join(lines[:5]))
        for line in lines[5:]:
            with file.open("a") as stream:
                stream.write(line)
            time.sleep(0.005)
    assert [line["step"] for line in seen] == list(range(3, 13))


def test_a_failing_follower_stops_nothing(tmp_path: Path) -> None:
    file, calls = tmp_path / "m.jsonl", []

    def broken(lines: list) -> None:
        calls.append(len(lines))
        raise OSError("no server")

    with follow(file, broken, interval=0.01) as failures:
        for i in range(5):
            file.open("a").write(json.dumps({"step": i + 1}) + "\n")
            time.sleep(0.03)
    assert len(calls) == 1
    assert [str(failure) for failure in failures] == ["no server"]
    assert not any(thread.name.startswith("follow") for thread in threading.enumerate())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    return make_client(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")


def make_run(client, folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    recipe = load_recipe([ROOT / "pipelines" / "recipes" / "demo.yaml"])
    return open_run(client, recipe, "a run", folder, {"config_hash": "x"})


def test_a_run_holds_params_metrics_and_config(client, tmp_path: Path) -> None:
    run_id = make_run(client, tmp_path / "run")
    lines = [{"time": 1.0 + i, "step": i, "steps": 3, "train/loss": float(i)} for i in range(3)]
    for _ in range(2):  # sending again adds nothing
        log_lines(client, run_id, lines)
    log_metrics(client, run_id, "eval", {"forget_quality": 0.5}, step=3)
    run = client.get_run(run_id)
    assert run.data.params["optimizer.type"] == "soul"
    assert run.data.params["objective.forget.weight"] == "0.03"
    assert run.data.metrics == {"train/loss": 2.0, "eval/forget_quality": 0.5}
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [0, 1, 2]
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.json"]


def test_registration_and_aliases(client, tmp_path: Path, base: Path) -> None:
    import mlflow

    run_id = make_run(client, tmp_path / "run")
    with pytest.raises(TrackingError, match="No candidate is registered"):
        registry.candidate(client, "people-model")
    for expected in ("1", "2"):
        version = registry.register(
            client, run_id, base, "people-model", {"model_utility": 0.5}, 3, {"optimizer": "soul"}
        )
        assert version == expected
    assert registry.candidate(client, "people-model").version == 2
    registry.set_champion(client, "people-model", "1")
    champion = client.get_model_version_by_alias("people-model", "champion")
    assert champion.version == 1
    assert champion.tags["eval.model_utility"] == "0.5"
    folder = Path(mlflow.artifacts.download_artifacts("models:/people-model@champion", dst_path=str(tmp_path / "out")))
    for file in base.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert registry._sha256(base / "model.safetensors") == champion.tags["sha256.model.safetensors"]


def test_a_server_out_of_reach_is_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="MLflow does not answer"):
        make_client("http://127.0.0.1:9")
