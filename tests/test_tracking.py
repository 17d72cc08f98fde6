import json
import threading
import time
from pathlib import Path

import pytest

from components.config import Gate, Tracking
from components.errors import TrackingError
from components.files import sha256, write_whole
from components.load_config import load_recipe
from components.tracking import registry
from components.tracking.follow import follow
from components.tracking.gates import gate_table, judge
from components.tracking.run import last_step, make_client, open_spool, put_lines, put_metrics, put_run
from components.tracking.spool import Spool

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


def test_a_failing_follower_is_handed_its_lines_again(tmp_path: Path) -> None:
    file, seen, calls = tmp_path / "m.jsonl", [], 0

    def broken_at_first(lines: list) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise OSError("no room")
        seen.extend(line["step"] for line in lines)

    with follow(file, broken_at_first, interval=0.01) as failures:
        for i in range(5):
            file.open("a").write(json.dumps({"step": i + 1}) + "\n")
            time.sleep(0.03)
        file.open("a").write('{"step": 6, "half')
    assert seen == [1, 2, 3, 4, 5]
    assert [str(failure) for failure in failures] == ["no room", "no room"]
    assert not any(thread.name.startswith("follow") for thread in threading.enumerate())


def test_what_is_measured_again_by_another_attempt_is_not_told_again(uri: str, tmp_path: Path) -> None:
    for _ in range(3):
        spool = make_run(uri, tmp_path / "run")
        put_metrics(spool, "eval", {"forget_quality": 0.5, "model_utility": 0.25}, step=0)
    put_metrics(spool, "eval", {"forget_quality": 0.5, "model_utility": 0.75}, step=6)
    points = [(key, value, step) for entry in spool.entries() for key, value, _, step in entry.get("points", ())]
    assert points == [
        ("eval/forget_quality", 0.5, 0),
        ("eval/model_utility", 0.25, 0),
        ("eval/forget_quality", 0.5, 6),
        ("eval/model_utility", 0.75, 6),
    ]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str):
    return make_client(uri)


def make_spool(uri: str, folder: Path) -> Spool:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return open_spool(folder, Tracking(uri=uri), folder.parent, lambda text: None)


def make_run(uri: str, folder: Path) -> Spool:
    spool = make_spool(uri, folder)
    recipe = load_recipe([ROOT / "pipelines" / "recipes" / "demo.yaml"])
    put_run(spool, recipe, "a run", folder, {"config_hash": "x"})
    return spool


LINES = [{"time": 1.0 + i, "step": i, "steps": 3, "rows": "abc", "train/loss": float(i)} for i in range(3)]


def test_a_run_holds_params_metrics_and_config(uri: str, client, tmp_path: Path) -> None:
    spool = make_run(uri, tmp_path / "run")
    put_lines(spool, LINES)
    put_metrics(spool, "eval", {"forget_quality": 0.5}, step=3)
    spool.put("end", status="FINISHED")
    assert spool.drain(5) == 0
    run_id = spool.known["run_id"]
    for _ in range(2):  # a crash before it was noted that all is sent: sending again adds nothing
        (tmp_path / "run" / "mlflow" / "sent.json").unlink()
        assert make_spool(uri, tmp_path / "run").drain(5) == 0
    assert make_spool(uri, tmp_path / "run").known["run_id"] == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.type"] == "soul"
    assert run.data.params["objective.forget.weight"] == "0.03"
    assert run.data.metrics == {"train/loss": 2.0, "eval/forget_quality": 0.5}
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [0, 1, 2]
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.json"]


def test_another_attempt_goes_on_in_the_same_run(uri: str, client, tmp_path: Path) -> None:
    """What a killed process wrote down and did not send is sent; steps that are done again are not told again."""
    spool = make_run(uri, tmp_path / "run")
    put_lines(spool, LINES)
    with (tmp_path / "run" / "mlflow" / "queue.jsonl").open("a") as stream:
        stream.write('{"kind": "metr')  # killed here
    again = make_run(uri, tmp_path / "run")
    assert last_step(again) == 2
    assert again.drain(5) == 0
    run = client.get_run(again.known["run_id"])
    assert run.data.tags["attempts"] == "2"
    assert run.data.metrics == {"train/loss": 2.0}
    assert run.info.status == "RUNNING"


def test_what_a_server_will_never_take_is_put_aside_with_the_reason(uri: str, client, tmp_path: Path) -> None:
    spool = make_run(uri, tmp_path / "run")
    put_lines(spool, LINES)
    spool.put("metrics", points=[["bad*name", 1.0, 1, 1], ["good", 2.0, 1, 1]])
    put_lines(spool, [{**LINES[0], "time": 9.0, "step": 9}])
    spool.put("artifact", path=str(tmp_path / "not there"))
    spool.put("tags", tags={"last": "yes"})
    assert spool.drain(5) == 0
    refused = spool.refused()
    assert [entry["kind"] for entry in refused] == ["metrics", "artifact"]
    assert [point[0] for point in refused[0]["points"]] == ["bad*name"]  # not what came along with it
    assert "bad*name" in refused[0]["reason"]
    run = client.get_run(spool.known["run_id"])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1, 2, 9]
    assert run.data.tags["last"] == "yes"
    assert run.data.metrics["good"] == 2.0


def test_a_server_that_fails_for_a_while_gets_everything_once(tmp_path: Path) -> None:
    got: list[int] = []
    calls = 0

    def take(client: str, known: dict, entry: dict) -> None:
        nonlocal calls
        calls += 1
        if 3 < calls < 6:
            raise ConnectionError("down")
        got.append(entry["n"])

    told: list[str] = []
    spool = Spool(tmp_path / "s", "u", lambda: "client", {"n": take}, told.append)
    with spool.sending(pause=0.01):
        for n in range(20):
            spool.put("n", n=n)
            time.sleep(0.002)
    assert spool.drain(5) == 0
    assert got == list(range(20))
    assert told == [
        f"MLflow does not take what it is told: down. It is kept in {tmp_path / 's'}.",
        "MLflow answers again",
    ]


def test_another_server_is_told_everything(uri: str, tmp_path: Path) -> None:
    make_run(uri, tmp_path / "run").drain(5)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    spool = make_spool(other, tmp_path / "run")
    assert spool.unsent() == 2
    assert spool.drain(5) == 0
    assert make_client(other).get_run(spool.known["run_id"]).info.run_name == "a run"
    assert make_spool(uri, tmp_path / "run").unsent() == 0


def test_registration_and_aliases(uri: str, client, tmp_path: Path, base: Path) -> None:
    import mlflow

    with pytest.raises(TrackingError, match="No candidate is registered"):
        registry.candidate(client, "people-model")
    for expected in ("1", "2"):
        spool = make_run(uri, tmp_path / f"run{expected}")
        spool.drain(5)
        run_id = spool.known["run_id"]
        for _ in range(2):  # a run has one version, however often it is sent
            version = registry.register(
                client, run_id, base, "people-model", {"model_utility": 0.5}, 3, {"optimizer": "soul"}
            )
            assert version == expected
            client.delete_registered_model_alias("people-model", "candidate")
        registry.register(client, run_id, base, "people-model", {}, 3, {})
        assert len(client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")) == 1
    assert registry.candidate(client, "people-model").version == 2
    registry.set_champion(client, "people-model", "1")
    champion = client.get_model_version_by_alias("people-model", "champion")
    assert champion.version == 1
    assert champion.tags["eval.model_utility"] == "0.5"
    folder = Path(mlflow.artifacts.download_artifacts("models:/people-model@champion", dst_path=str(tmp_path / "out")))
    for file in base.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert sha256(base / "model.safetensors") == champion.tags["sha256.model.safetensors"]
    fetched = registry.fetch(client, "models:/people-model@champion", tmp_path / "registered")
    assert (fetched / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert registry.fetch(client, "models:/people-model/1", tmp_path / "registered") == fetched
    client.set_model_version_tag("people-model", "2", "sha256.model.safetensors", "0" * 64)
    with pytest.raises(TrackingError, match="Registered model was altered"):
        registry.fetch(client, "models:/people-model/2", tmp_path / "registered")
    assert not (tmp_path / "registered" / "people-model-2").exists()
    for wrong in ("models:/people-model@nobody", "models:/nothing/1", "models:/people-model/77"):
        with pytest.raises(TrackingError, match="Model is not registered"):
            registry.fetch(client, wrong, tmp_path / "registered")


def test_a_server_out_of_reach_is_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="MLflow does not answer"):
        make_client("http://127.0.0.1:9")
