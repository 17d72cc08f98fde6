import json
import re
import shlex
import shutil
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow.cli import cli

from components.errors import TrackingError
from components.files import sha256, write_whole
from components.load_config import load_recipe
from components.tracking import registry
from components.tracking.client import make_client
from components.tracking.follow import follow
from components.tracking.ledger import find_ledger, make_ledger
from components.tracking.manifest import manifest_digest, manifest_of
from components.tracking.run import Input, last_step, open_spool, put_lines, put_metrics, put_run, settings_of
from components.tracking.spool import Spool

ROOT = Path(__file__).resolve().parents[1]


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
    return open_spool(folder, uri, lambda text: None)


def make_run(uri: str, folder: Path) -> Spool:
    spool = make_spool(uri, folder)
    recipe = load_recipe([ROOT / "pipelines" / "recipes" / "demo.yaml"])
    tags, config = {"config_hash": "x"}, folder / "config.json"
    put_run(
        spool,
        recipe.tracking.experiment,
        folder.parent,
        folder,
        settings_of(recipe),
        tags,
        name="a run",
        files=[config],
    )
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


def test_registration(uri: str, client, tmp_path: Path, base: Path) -> None:
    with pytest.raises(TrackingError, match="No candidate is registered"):
        registry.candidate(client, "people")
    for expected in ("1", "2"):
        run_id = begun_run(uri, tmp_path / f"run{expected}")
        for _ in range(2):  # a run has one version, however often it is sent
            assert add(client, run_id, base, f"2026-01-0{expected}") == expected
            client.delete_registered_model_alias("people-candidates", "candidate")
        add(client, run_id, base, f"2026-01-0{expected}")
        assert len(client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")) == 1
    newest = registry.candidate(client, "people")
    assert (newest.version, newest.tags["optimizer"]) == (2, "soul")
    assert registry.candidate(client, "people", "1").version == 1
    assert manifest_digest(manifest_of(base)) == newest.tags["manifest"]
    fetched = registry.fetch(client, newest, tmp_path / "registered")
    assert {file.name for file in fetched.iterdir()} == {file.name for file in base.iterdir()}
    for file in base.iterdir():
        assert (fetched / file.name).read_bytes() == file.read_bytes()
    for wrong in ("models:/people-candidates@nobody", "models:/nothing/1", "models:/people-candidates/77"):
        with pytest.raises(TrackingError, match="Model is not registered"):
            registry.find(client, wrong)


def test_a_model_that_is_sent_late_does_not_become_the_candidate(uri: str, client, tmp_path: Path, base: Path) -> None:
    add(client, begun_run(uri, tmp_path / "new"), base, "2026-02-02", "late")
    add(client, begun_run(uri, tmp_path / "old"), base, "2026-01-01", "late")
    assert registry.candidate(client, "late").version == 1


def test_metrics_of_the_model_are_found_by_the_model(uri: str, client, tmp_path: Path, base: Path) -> None:
    spool = make_run(uri, tmp_path / "run")
    spool.put(
        "model",
        folder=str(base),
        name="measured",
        step=3,
        tags={},
        description="**what** it is",
        trained_at="2026-01-01",
    )
    put_metrics(spool, "eval", {"utility": 0.5}, step=3, of_model=True)
    put_metrics(spool, "retain_only", {"utility": 0.7}, step=3)
    assert spool.drain(5) == 0
    run = client.get_run(spool.known["run_id"])
    assert run.data.metrics == {"eval/utility": 0.5, "retain_only/utility": 0.7}
    assert [output.model_id for output in run.outputs.model_outputs] == [spool.known["model_id"]]
    model = client.get_logged_model(spool.known["model_id"])
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("eval/utility", 0.5, 3)]
    assert client.get_model_version("measured-candidates", spool.known["version"]).description == "**what** it is"


def test_an_altered_model_is_refused_file_by_file(uri: str, client, tmp_path: Path, base: Path) -> None:
    add(client, begun_run(uri, tmp_path / "run"), base, "2026-01-01", "altered")
    version = registry.candidate(client, "altered")
    stored = Path(client.get_logged_model(version.source.removeprefix("models:/")).artifact_location)
    good = registry.fetch(client, version, tmp_path / "kept")
    weights = stored / "model.safetensors"
    whole = weights.read_bytes()
    changes = {
        "model.safetensors was altered": lambda: weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "model.safetensors is missing": weights.unlink,
        "more.json was not there": lambda: (stored / "more.json").write_text("{}"),
        "MANIFEST.json has another sha256": lambda: (stored / "MANIFEST.json").write_text("{}"),
    }
    for told, change in changes.items():
        kept = {file.name: file.read_bytes() for file in stored.iterdir()}
        change()
        with pytest.raises(TrackingError, match=f"Registered model was altered.*{told}"):
            registry.fetch(client, version, tmp_path / "registered")
        for file in stored.iterdir():
            file.unlink()
        for name, content in kept.items():
            (stored / name).write_bytes(content)
        assert not list((tmp_path / "registered").glob("*"))
    (good / "model.safetensors").write_bytes(b"x")  # the copy that was fetched before
    assert sha256(registry.fetch(client, version, tmp_path / "kept") / "model.safetensors") == sha256(weights)


def test_what_could_run_code_is_not_registered(uri: str, client, tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "modeling.py").write_text("print()")
    with pytest.raises(TrackingError, match=r"modeling\.py\). Expected only .safetensors"):
        add(client, begun_run(uri, tmp_path / "run"), folder, "2026-01-01", "code")


def begun_run(uri: str, folder: Path) -> str:
    spool = make_run(uri, folder)
    spool.drain(5)
    return spool.known["run_id"]


def add(client, run_id: str, folder: Path, trained_at: str, name: str = "people") -> str:
    tags = {"optimizer": "soul"}
    return str(registry.register(client, run_id, folder, name, tags, step=3, trained_at=trained_at).version)


def test_a_run_names_its_data_sets_and_tables(uri: str, client, tmp_path: Path) -> None:
    spool = make_spool(uri, tmp_path / "run")
    recipe = load_recipe([ROOT / "pipelines" / "recipes" / "demo.yaml"])
    inputs = [Input("forget", "ab" * 16, 60, ["people:forget"])]
    put_run(spool, recipe.tracking.experiment, tmp_path, tmp_path / "run", {}, {}, inputs=inputs)
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "a.png").write_bytes(b"x")
    spool.put("artifact", path=str(tmp_path / "run" / "figures"), into="figures")
    assert spool.drain(5) == 0
    run = client.get_run(spool.known["run_id"])
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("forget", "ab" * 16)
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "forget")]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/a.png"]


def test_a_server_out_of_reach_is_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="MLflow does not answer"):
        make_client("http://127.0.0.1:9")


@pytest.mark.parametrize("what", ["experiment", "run", "experiment before the run", "run for good"])
def test_what_was_deleted_in_mlflow_is_named_with_its_cures_and_nothing_is_lost(
    what: str, uri: str, client, tmp_path: Path
) -> None:
    told: list[str] = []
    (tmp_path / "run").mkdir()
    spool = open_spool(tmp_path / "run", uri, told.append)
    name = f"of {tmp_path.name}"
    experiment = client.create_experiment(name)
    put_run(spool, name, tmp_path, tmp_path / "run", {}, {})
    if what != "experiment before the run":
        assert spool.drain(5) == 0
    if what.startswith("run"):
        client.delete_run(spool.known["run_id"])
    else:
        client.delete_experiment(experiment)
    if what == "run for good":
        client._tracking_client.store._hard_delete_run(spool.known["run_id"])
    put_lines(spool, LINES)
    spool.put("tags", tags={"a": "b"})
    waiting = spool.unsent()
    assert spool.drain(0) == waiting
    [line] = told
    assert "\n" not in line
    assert (name if what.startswith("experiment") else spool.known["run_id"]) in line
    assert "if_exists=new" in line
    assert spool.refused() == []
    if what == "run for good":
        assert "is not in MLflow any more" in line
        (tmp_path / "run" / "mlflow" / "sent.json").unlink()
        spool = open_spool(tmp_path / "run", uri, told.append)
    else:
        [command] = re.findall(r"with (MLFLOW_TRACKING_URI=.*?)[;,] ?o?r", line)
        variable, _, *words = shlex.split(command)
        done = CliRunner().invoke(cli, words, env=dict([variable.split("=", 1)]))
        assert done.exit_code == 0, done.output
    assert spool.drain(5) == 0
    run = client.get_run(spool.known["run_id"])
    assert run.data.tags["a"] == "b"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == len(LINES)


def test_an_experiment_of_promotions_that_was_deleted_is_named(uri: str, client, tmp_path: Path) -> None:
    made = make_ledger(client, "ledgered", tmp_path)
    client.delete_run(made.run_id)
    with pytest.raises(TrackingError, match=f"Run is deleted in MLflow .run={made.run_id}.*runs restore --run-id"):
        find_ledger(client, "ledgered")


@pytest.mark.parametrize("length", [300, 5001, 9000, 40_000])
def test_long_names_and_texts_do_not_keep_a_run_from_being_sent(length: int, uri: str, client, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    spool = open_spool(tmp_path / "run", uri, lambda text: None)
    settings, tags = {"s" * length: 1, "short": 2, "text": "t" * length}, {"mlflow.source.name": "c" * length}
    put_run(spool, "x" * min(length, 500), tmp_path, tmp_path / "run", settings, tags, name="n" * min(length, 250))
    spool.put("tags", tags={"mlflow.note.content": "d" * length, "after": "it"})
    assert spool.drain(5) == 0
    assert spool.refused() == []
    run = client.get_run(spool.known["run_id"])
    assert run.data.params["short"] == "2"
    assert run.data.tags["after"] == "it"
    assert run.data.tags["mlflow.source.name"].startswith("c" * 300)
