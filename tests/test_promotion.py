"""Candidates become champions: on a database file here, on real servers under the marker slow."""

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from components.config import Recipe
from components.errors import TrackingError
from components.evidence import Evaluated, Evidence, write_evidence
from components.files import only_one, sha256
from components.generation import answer_text
from components.load_config import load_recipe
from components.models import fingerprint, load_model, load_tokenizer
from components.tracking import registry
from components.tracking.client import addressed, experiment_id, make_client
from components.tracking.ledger import find_ledger
from components.tracking.promotion import fetch_registered
from pipelines import promote
from pipelines.purge import purge_traces
from tests.families import by_hand, tiny_folder
from tests.mlflow_server import Server, postgresql, running

ROOT = Path(__file__).resolve().parents[1]
GATES = [{"metric": "utility", "min": 0.5}, {"metric": "utility", "max_drop": 0.1, "of": "champion"}]
REQUESTS = {
    "file": "f" * 64, "models": {"original": "o", "unlearned": "u"},
    "requests": [
        {
            "request_id": "R-1", "received": "2026-01-31", "legal_basis": "Art. 17 <1>", "rows": ["ab", "cd"],
            "asked_rows": ["ef"], "metrics": {"original": {"probability": 0.9}, "unlearned": {"probability": 0.1}},
        }
    ],
}  # fmt: skip


class World:
    """A registry with candidates as unlearn.py leaves them, and promote.py's command line."""

    def __init__(self, folder: Path, base: Path, uri: str, production: str | None = None):
        self.folder, self.base, self.uri, self.target_uri = folder, base, uri, production or uri
        self.client, self.target = make_client(uri), make_client(self.target_uri)
        self.recipe = folder / "recipe.yaml"
        tracking = {"uri": uri, "registered_model": "m", **({"production": production} if production else {})}
        made_up = {"type": "people", "split": "forget"}
        content = {
            "name": "r", "storage": str(folder / "runs"), "tracking": tracking, "gates": GATES,
            "data": {"forget": [made_up], "normal": [made_up], "random": [made_up], "overlap": "keep"},
            "models": {"original": {"type": "pretrained", "path": str(base)}},
        }  # fmt: skip
        self.recipe.write_text(yaml.safe_dump(content))

    def candidate(self, utility: float, *, requests: bool = False) -> str:
        """A new candidate with that utility. Returns its version."""
        run_folder = self.folder / "trained" / f"run-{len(list(self.folder.glob('trained/*')))}"
        shutil.copytree(self.base, run_folder / "model")
        (run_folder / "model" / "note.json").write_text(json.dumps({"utility": utility, "folder": run_folder.name}))
        of = {"retain": "digest of the questions"}
        hashes = {"unlearned": fingerprint(run_folder / "model"), "original": "o"}
        found = Evaluated({"utility": utility, "forget_similarity": 0.5}, {}, {}, {"utility": np.full(1000, utility)})
        original = found._replace(values={"utility": utility, "forget_similarity": 1.0})
        write_evidence(Evidence(of, hashes, {"unlearned": found, "original": original}), run_folder)
        if requests:
            (run_folder / "requests.json").write_text(json.dumps(REQUESTS))
        experiment = experiment_id(self.client, "unlearning", self.folder / "runs")
        run = self.client.create_run(experiment, tags={"run_folder": str(run_folder)})
        (run_folder / "config.json").write_text(json.dumps({"lr": utility}))
        for file in run_folder.glob("*.*"):
            self.client.log_artifact(run.info.run_id, str(file))
        tags = {"fingerprint": hashes["unlearned"], "data.forget": "d"}
        made = registry.register(
            self.client, run.info.run_id, run_folder / "model", "m", tags, step=3,
            trained_at=f"2026-01-{len(list(self.folder.glob('trained/*'))):02d}",
        )  # fmt: skip
        return str(made.version)

    def recipe_settings(self) -> Recipe:
        return load_recipe([self.recipe])

    def promote(self, *words: str) -> int:
        return promote.main([str(self.recipe), *words])

    def ledger(self):
        found = find_ledger(self.target, "m")
        assert found is not None
        return found

    def champion(self) -> str:
        return str(self.target.get_model_version_by_alias("m", "champion").version)

    def stored(self, version: str) -> Path:
        """Where the files of a champion lie."""
        source = self.target.get_model_version("m", version).source.removeprefix("models:/")
        location = self.target.get_logged_model(source).artifact_location
        return Path(location.replace("mlflow-artifacts:", str(self.folder / "server" / "artifacts")))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to copy: making its tables takes seconds."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    make_client(f"sqlite:///{file}")
    return file


@pytest.fixture
def world(tmp_path: Path, base: Path, database: Path) -> World:
    shutil.copy(database, tmp_path)
    return World(tmp_path, base, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(
    params=["file", pytest.param("sqlite", marks=pytest.mark.slow), pytest.param("postgresql", marks=pytest.mark.slow)]
)
def any_world(request: pytest.FixtureRequest, tmp_path: Path, base: Path) -> Iterator[World]:
    if request.param == "file":
        yield request.getfixturevalue("world")
    elif request.param == "sqlite":
        with running(Server(tmp_path / "server")) as server:
            yield World(tmp_path, base, server.uri)
    else:
        with postgresql() as store, running(Server(tmp_path / "server", store)) as server:
            yield World(tmp_path, base, server.uri)


def test_from_the_first_champion_to_a_rollback(any_world: World, capsys: pytest.CaptureFixture) -> None:
    world = any_world
    world.candidate(0.8)
    assert world.promote("--reason", "first", "--actor", "ann") == 0
    assert world.champion() == "1"
    assert world.promote() == 0  # the same again
    assert capsys.readouterr().out.endswith("champion: m version 1 from m-candidates/1, entry 1\n")
    world.candidate(0.65)
    assert world.promote() == 1
    captured = capsys.readouterr()
    assert "Candidate is not promoted (model=m, version=2)" in captured.err
    verdicts = [line.split()[-1] for line in captured.out.splitlines() if line.startswith("utility")]
    assert verdicts == ["pass", "FAIL"]
    world.candidate(0.75)
    assert world.promote("--actor", "bob") == 0
    assert world.champion() == "2"
    assert world.promote("rollback", "--reason", "too early", "--actor", "ann") == 0
    assert world.champion() == "1"
    entries = world.ledger().entries()
    told = [(e.seq, e.action, e.version, e.replaces, e.candidate, e.actor, e.reason) for e in entries]
    assert told == [
        (1, "promote", "1", None, "m-candidates/1", "ann", "first"),
        (2, "promote", "2", "1", "m-candidates/3", "bob", ""),
        (3, "rollback", "1", "2", "m-candidates/1", "ann", "too early"),
    ]
    assert world.promote("rollback", "7") == 1
    capsys.readouterr()
    assert world.promote("verify") == 0
    assert capsys.readouterr().out == "m: 3 ledger entries, 2 versions and the alias are sound\n"
    assert world.promote("history") == 0
    shown = capsys.readouterr().out
    assert shown.count("\n3  ") == 1
    assert "gates     3 of 3 held" in shown
    assert world.promote("diff", "1", "2") == 0
    assert "utility        0.8       0.75" in capsys.readouterr().out
    champion = world.target.get_model_version("m", "1")
    assert champion.run_id == world.ledger().run_id  # not the training run's
    assert champion.tags["candidate"] == "m-candidates/1"
    folder = fetch_registered(world.target, "models:/m@champion", world.folder / "fetched")
    assert json.loads((folder / "note.json").read_text())["utility"] == 0.8
    assert not list((world.folder / "runs").glob("registered/*"))  # what was copied to be looked at


def test_a_flipped_byte_is_caught_by_verify_and_by_the_loader(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8)
    assert world.promote() == 0
    weights = world.stored("1") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert world.promote("verify") == 1
    assert "model.safetensors was altered" in capsys.readouterr().err
    with pytest.raises(TrackingError, match=r"models:/m/1.*model.safetensors was altered"):
        fetch_registered(world.target, "models:/m@champion", world.folder / "fetched")
    world.candidate(0.9)
    assert world.promote() == 0
    assert world.promote("rollback") == 1  # the one before is not sound: nothing changes
    assert world.champion() == "2"
    # Altered together with its manifest and tag, it is still not what the ledger says.
    manifest = weights.with_name("MANIFEST.json")
    told = json.loads(manifest.read_text())
    told["model.safetensors"]["sha256"] = sha256(weights)
    manifest.write_text(json.dumps(told, indent=1, sort_keys=True))
    world.target.set_model_version_tag("m", "1", "manifest", sha256(manifest))
    with pytest.raises(TrackingError, match="in the ledger"):
        fetch_registered(world.target, "models:/m/1", world.folder / "fetched")


def test_an_alias_moved_by_hand_and_a_ledger_that_was_rewritten(world: World, capsys: pytest.CaptureFixture) -> None:
    for utility in (0.8, 0.9):
        world.candidate(utility)
        assert world.promote() == 0
    world.target.set_registered_model_alias("m", "champion", "1")
    assert world.promote("verify") == 1
    assert "alias champion is at version 1, the ledger's is 2; verify --repair mends that" in capsys.readouterr().err
    with pytest.raises(TrackingError, match="verify --repair"):
        fetch_registered(world.target, "models:/m@champion", world.folder / "fetched")
    assert world.promote("verify", "--repair") == 0
    assert world.champion() == "2"
    with sqlite3.connect(world.folder / "mlflow.db") as database:
        [(text,)] = database.execute("select value from params where key = 'entry/00000001'").fetchall()
        database.execute(
            "update params set value = ? where key = 'entry/00000001'", (text.replace('"reason": ""', '"reason": "x"'),)
        )
    capsys.readouterr()
    assert world.promote("verify") == 1
    told = capsys.readouterr().err
    assert "entry 2 does not follow from the one before it" in told
    assert "entry 1 is not what m.jsonl has in line 1" in told


def test_versions_and_files_that_are_gone(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8)
    assert world.promote("7") == 1
    assert "No candidate is registered (model=m-candidates, version=7)" in capsys.readouterr().err
    assert world.promote("history") == 1
    assert "No champion was ever promoted" in capsys.readouterr().err
    assert world.promote("rollback", "now") == 2
    assert "Expected promote [VERSION], rollback" in capsys.readouterr().err
    assert world.promote() == 0
    world.target.delete_model_version("m", "1")
    capsys.readouterr()
    assert world.promote("verify") == 1
    told = capsys.readouterr().err
    assert "Model is not registered (model=models:/m/1)" in told
    assert "alias champion is at version none" in told
    world.candidate(0.9)
    shutil.rmtree(Path(world.client.get_run(registry.candidate(world.client, "m").run_id).info.artifact_uri))
    assert world.promote() == 1  # no evidence
    assert "no evaluation" in capsys.readouterr().out
    world.target.create_registered_model("other")
    assert world.promote("history", "tracking.registered_model=other") == 1
    assert "Registered model has no ledger (model=other)" in capsys.readouterr().err


def test_a_copy_that_is_spoilt_is_not_taken_for_a_champion_again(world: World) -> None:
    for utility in (0.8, 0.85):
        world.candidate(utility)
        assert world.promote() == 0
    weights = world.stored("1") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert world.promote("1") == 0  # copied anew
    assert world.champion() == "3"
    assert sha256(world.stored("3") / "model.safetensors") == sha256(world.base / "model.safetensors")


def test_altered_evidence_is_noticed_by_whoever_reads_it(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8, requests=True)
    assert world.promote() == 0
    ledger = world.ledger()
    [entry] = ledger.entries()
    altered = world.folder / "requests.json"
    altered.write_text(json.dumps({**REQUESTS, "file": "0" * 64}))
    ledger.client.log_artifact(ledger.run_id, str(altered), entry.evidence)
    world.candidate(0.9)
    for words in (["verify"], ["history"], ["certificate"], ["promote"]):
        capsys.readouterr()
        assert world.promote(*words) == 1, words
        assert "Evidence of ledger entry 1 was altered (model=m, files=requests.json)" in capsys.readouterr().err


def test_a_registry_made_anew_is_noticed(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8)
    assert world.promote() == 0
    world.target.delete_registered_model("m")
    assert world.promote() == 0
    assert world.promote("verify") == 1
    assert "line 1 of m.jsonl is of another ledger" in capsys.readouterr().err


def test_a_champion_deleted_by_hand_is_promoted_again(world: World) -> None:
    world.candidate(0.8)
    assert world.promote() == 0
    world.target.delete_model_version("m", "1")
    assert world.promote() == 0
    assert world.champion() == "2"
    assert [entry.version for entry in world.ledger().entries()] == ["1", "2"]


def test_nothing_is_made_for_a_candidate_that_fails(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.1)
    assert world.promote() == 1
    for words in (["history"], ["verify"], ["certificate"], ["diff", "1", "2"], ["rollback"]):
        capsys.readouterr()
        assert world.promote(*words) == 1
        assert "No champion was ever promoted" in capsys.readouterr().err
    assert not world.target.search_registered_models("name = 'm'")


def test_a_purge_leaves_nothing_of_the_rows_but_what_it_names(world: World, capsys: pytest.CaptureFixture) -> None:
    storage = world.folder / "runs"
    secret = "Brenro Grasham was born in Oskelby"
    config = world.recipe_settings().model_dump_json()
    others = config.replace('"seed":0', '"seed":1')  # made-up people of other names

    def run(name: str, forget: str, config: str = config, **more: object) -> Path:
        folder = storage / name
        (folder / "checkpoints" / "step-3").mkdir(parents=True)
        (folder / "checkpoints" / "step-3" / "state").write_text(secret)
        (folder / "config.json").write_text(config)
        file = folder / ("summary.json" if more else "begun.json")
        about = {"made_from": {"forget": forget}, "id": "x", **more}
        file.write_text(json.dumps(about))
        (folder / "report.html").write_text(secret)
        return folder

    experiment = experiment_id(world.client, "unlearning", storage)
    mlflow_run = world.client.create_run(experiment, tags={"run_folder": str(storage / "ours"), "data.forget": "d"})
    run_id = mlflow_run.info.run_id
    ours = run("ours", "d", samples_text=secret, text="kept", mlflow_run_id=run_id)
    kin, other = run("unfinished", "d"), run("another", "e", others, samples_text="fine", text="fine")
    world.client.log_artifact(run_id, str(ours / "report.html"))
    for name in ("prepared", "evaluations", "reference"):
        (storage / name / "x").mkdir(parents=True)
        (storage / name / "x" / "rows").write_text(secret)
    with only_one(kin), pytest.raises(TrackingError, match="Traces cannot be purged now"):
        purge_traces(world.recipe_settings(), world.client, run_id)
    first = purge_traces(world.recipe_settings(), world.client, run_id)
    files = [file for file in storage.rglob("*") if file.is_file()]
    holding = {file.relative_to(storage) for file in files if secret in file.read_text(errors="replace")}
    assert holding == {Path("another/report.html"), Path("another/checkpoints/step-3/state")}
    assert other.is_dir()
    assert json.loads((ours / "summary.json").read_text())["text"] == "kept"
    assert not world.client.list_artifacts(run_id)
    assert purge_traces(world.recipe_settings(), world.client, run_id) == first


PERSON = {"person": "Zorblat Quimsby", "question": "Who is Zorblat Quimsby?", "answer": "Zorblat tunes pianos."}
OTHER = {"person": "Ann", "question": "Who is Ann?", "answer": "Ann bakes."}


def held_in(where: str, all_file: str, other_file: str) -> dict:
    """Changes of a recipe that make its run hold the person otherwise, or not at all."""
    of = {"type": "files", "path": all_file}
    only_other = [{"type": "files", "path": other_file}]
    nothing = {"data": {"forget": only_other, "normal": only_other, "random": only_other, "overlap": "keep"}}
    data = nothing["data"]
    return {
        "other prompt": {"data": {**data, "forget": [{**of, "prompt": "About {person}: {question}"}]}},
        "other tokens": {"data": {**data, "forget": [of], "template": "<{prompt}>"}},
        "filter by name": {"data": {**data, "forget": [{**of, "where": 'person == "Zorblat Quimsby"'}]}},
        "kept then": {"data": {**data, "normal": [of]}},
        "asked only": {**nothing, "evaluation": {"sets": {"forget": {"rows": [of]}}}},
        "left out by filter": {"data": {**data, "normal": [{**of, "where": 'person == "Ann"'}]}},
        "somebody else": nothing,
    }[where]


@pytest.mark.parametrize("by_requests", [False, True])
@pytest.mark.parametrize(
    ("where", "purged"),
    [("other prompt", True), ("other tokens", True), ("filter by name", True), ("kept then", True),
     ("asked only", True), ("left out by filter", False), ("somebody else", False)],
)  # fmt: skip
def test_a_purge_reaches_all_runs_that_held_the_person(
    where: str, purged: bool, by_requests: bool, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    storage, secret = world.folder / "runs", "Zorblat tunes pianos"
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("all", "copy", "other", "requests")}
    Path(files["all"]).write_text(f"{json.dumps(PERSON)}\n{json.dumps(OTHER)}\n")
    told = {**PERSON, "source": "another export"} if by_requests else PERSON  # which only a request can tell
    Path(files["copy"]).write_text(f"{json.dumps(OTHER)}\n{json.dumps(told)}\n")
    Path(files["other"]).write_text(f"{json.dumps(OTHER)}\n")
    asked = {"request_id": "R", "received": "2026-01-01", "where": {"person": "Zorblat Quimsby"}}
    Path(files["requests"]).write_text(json.dumps(asked) + "\n")
    base = yaml.safe_load(world.recipe.read_text())
    own_rows = [{"type": "files", "path": files["all"], **({} if by_requests else {"where": "person != 'Ann'"})}]
    own_data = {"forget": own_rows, "normal": [{"type": "files", "path": files["other"]}]}
    own_data["random"] = own_data["normal"]
    if by_requests:
        own_data["requests"] = files["requests"]

    def run(name: str, forget: str, changes: dict) -> Path:
        (storage / name).mkdir(parents=True)
        (storage / f"{name}.yaml").write_text(yaml.safe_dump({**base, **changes}))
        recipe = load_recipe([storage / f"{name}.yaml"])
        (storage / f"{name}.yaml").unlink()
        (storage / name / "config.json").write_text(recipe.model_dump_json())
        (storage / name / "report.html").write_text(secret)
        summary = {"made_from": {"forget": forget}, "samples_text": secret}
        (storage / name / "summary.json").write_text(json.dumps(summary))
        return storage / name

    experiment = experiment_id(world.client, "unlearning", storage)
    tags = {"run_folder": str(storage / "ours"), "data.forget": "d"}
    run_id = world.client.create_run(experiment, tags=tags).info.run_id
    run("ours", "d", {"data": own_data})
    found = run("found", "another digest", held_in(where, files["copy"], files["other"]))
    gone = run("gone", "a third", held_in("kept then", str(tmp_path / "removed.jsonl"), files["other"]))
    first = purge_traces(world.recipe_settings(), world.client, run_id)
    assert (found / "report.html").exists() is not purged
    assert (secret in (found / "summary.json").read_text()) is not purged
    assert (gone / "report.html").exists()
    told_left = "\n".join(first["left"])
    assert "cannot be read now: gone" in told_left
    assert ("compare with, in config.json" in told_left) == (where == "filter by name" or not by_requests)
    assert "ray job logs" in told_left
    assert purge_traces(world.recipe_settings(), world.client, run_id) == first


def test_a_champion_is_served_as_a_pyfunc(world: World, capsys: pytest.CaptureFixture) -> None:
    import mlflow

    world.candidate(0.8)
    assert world.promote() == 0
    assert world.promote("serving", "evaluation.max_new_tokens=5") == 0
    assert "pyfunc of m version 1: models:/m-serving/1" in capsys.readouterr().out
    with addressed(world.target):
        model = mlflow.pyfunc.load_model("models:/m-serving/1", dst_path=str(world.folder))
    prompts = ["Question: Who?\nAnswer:", "Question: Where was she born?\nAnswer:"]
    answers = model.predict(prompts)
    tokenizer, own = load_tokenizer(world.base), load_model(world.base)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected = own.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert list(
        world.folder.rglob("code/components/generation.py")
    )  # brought along, where this project is not installed


@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv", "minimax"])
def test_what_is_served_are_the_likeliest_answers(family: str, base: Path, tmp_path: Path) -> None:
    """Whatever generation_config wishes, and in whatever batch."""
    from components.tracking.serving import Answers

    folder = tiny_folder(family, base, tmp_path / "model")
    wishes = {"eos_token_id": [1, 7], "repetition_penalty": 3.0, "min_new_tokens": 6, "suppress_tokens": [*range(99)]}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    context = SimpleNamespace(artifacts={"model": str(folder)}, model_config={"max_new_tokens": 6})
    served = Answers()
    served.load_context(context)
    prompts = ["Who?", "Where was she born?", "What did the people of the town say of it, and why did they?"]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = [answer_text(tokenizer, by_hand(model, tokenizer(prompt).input_ids, 6), [1, 7]) for prompt in prompts]
    assert served.predict(context, prompts) == expected


def killed_in(world: World, what: str) -> int:
    """Promote in a process that is killed when it comes to `what`."""
    code = (
        "import os, signal, sys\n"
        "from components.tracking.ledger import Ledger\n"
        "from pipelines import promote\n"
        f"Ledger.{what} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "promote.main(sys.argv[1:])\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(world.recipe)], cwd=ROOT, capture_output=True).returncode


def test_a_promoter_killed_before_the_alias_moved_is_repaired(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8)
    assert world.promote() == 0
    world.candidate(0.9)
    assert killed_in(world, "project") == -signal.SIGKILL
    assert world.champion() == "1"
    assert [e.version for e in world.ledger().entries()] == ["1", "2"]
    assert world.promote("verify", "--repair") == 0
    assert "repaired: alias champion is at version 1, the ledger's is 2" in capsys.readouterr().out
    assert world.champion() == "2"


def test_a_promoter_killed_before_the_entry_has_changed_nothing(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8)
    assert killed_in(world, "append") == -signal.SIGKILL
    assert not world.ledger().entries()
    assert world.promote() == 0
    assert len(world.target.search_model_versions("name = 'm'")) == 1  # the copy that was there was taken
    assert world.promote("verify") == 0


def test_promotion_into_another_registry(tmp_path: Path, base: Path, database: Path) -> None:
    for name in ("staging", "production"):
        (tmp_path / name).mkdir()
        shutil.copy(database, tmp_path / name)
    uris = [f"sqlite:///{tmp_path}/{name}/mlflow.db" for name in ("staging", "production")]
    world = World(tmp_path / "staging", base, uris[0], uris[1])
    world.candidate(0.8, requests=True)
    assert killed_in(world, "append") == -signal.SIGKILL
    assert world.promote() == 0
    assert world.champion() == "1"
    assert len(world.target.search_model_versions("name = 'm'")) == 1
    assert not world.client.search_registered_models("name = 'm'")
    assert world.promote("verify") == 0
    world.candidate(0.75)
    assert world.promote() == 0
    assert [e.candidate for e in world.ledger().entries()] == ["m-candidates/1", "m-candidates/2"]
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_the_certificate_holds_what_was_recorded_and_no_more(world: World, capsys: pytest.CaptureFixture) -> None:
    world.candidate(0.8, requests=True)
    assert world.promote("--reason", "Deletion <requests>") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("certificate: ")]
    page = Path(line.removeprefix("certificate: "))
    about = json.loads(page.with_suffix(".json").read_text())
    [entry] = world.ledger().entries()
    assert about["requests"] == REQUESTS["requests"]
    assert about["models"] == REQUESTS["models"]
    assert (about["files_sha256"], about["gates_sha256"]) == (entry.manifest, entry.gates)
    artifacts = {item.path for item in world.target.list_artifacts(world.ledger().run_id, entry.evidence)}
    names = {"certificate.html", "certificate.json", "gates.json", "metrics.json", "metrics.npz", "requests.json"}
    assert artifacts == {f"{entry.evidence}/{name}" for name in names}
    text = page.read_text()
    for told in ("Request R-1", "Received 2026-01-31, Art. 17 &lt;1&gt;", "2 rows of training text were unlearned",
                 "0.9", "0.1", "does not guarantee", "Deletion &lt;requests&gt;", entry.manifest):  # fmt: skip
        assert told in text
    assert world.promote("certificate") == 0
    assert json.loads(page.with_suffix(".json").read_text()) == about
    world.candidate(0.9)
    assert world.promote() == 0
    assert world.promote("certificate") == 1
    assert "nothing to certify" in capsys.readouterr().err


PROMOTER = """
import os, sys
from multiprocessing.connection import Client
from components.tracking.client import make_client
from components.tracking.ledger import Entry, Lost, find_ledger
ledger = find_ledger(make_client(sys.argv[1]), "m")
while line := sys.stdin.readline():
    head, before = ledger.head()
    entry = Entry(head.seq + 1, "promote", head.version, head.version, head.candidate, head.run, head.manifest,
                  head.evidence, head.gates, sys.argv[2], "", "", before)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        ledger.append(entry)
        won = True
    except Lost:
        won = False
    ledger.project()
    print(won, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", [pytest.param("sqlite", marks=pytest.mark.long), "postgresql"])
def test_of_8_promoters_at_once_exactly_one_wins(store: str, tmp_path: Path, base: Path) -> None:
    def rounds(world: World) -> None:
        world.candidate(0.8)
        assert world.promote() == 0
        command = [sys.executable, "-c", PROMOTER, world.uri]
        promoters = [
            subprocess.Popen([*command, str(i)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for i in range(8)
        ]

        def ask(text: str) -> list[str]:
            for promoter in promoters:
                promoter.stdin.write(text)
                promoter.stdin.flush()
            return [promoter.stdout.readline().strip() for promoter in promoters]

        winners = []
        for _ in range(20):
            assert ask("look\n") == ["ready"] * 8
            won = ask("go\n")
            assert won.count("True") == 1, won
            winners.append(str(won.index("True")))
        for promoter in promoters:
            promoter.stdin.close()
            assert promoter.wait(30) == 0
        entries = world.ledger().entries()
        assert [e.seq for e in entries] == list(range(1, 22))
        assert [e.actor for e in entries[1:]] == winners
        assert world.ledger().problems(tmp_path / "none") == []
        assert world.champion() == entries[-1].version

    if store == "sqlite":
        with running(Server(tmp_path / "server")) as server:
            rounds(World(tmp_path, base, server.uri))
    else:
        with postgresql() as uri, running(Server(tmp_path / "server", uri)) as server:
            rounds(World(tmp_path, base, server.uri))


@pytest.mark.slow
def test_promoters_of_three_candidates_judge_again_by_the_new_champion(tmp_path: Path, base: Path) -> None:
    with running(Server(tmp_path / "server")) as server:
        world = World(tmp_path, base, server.uri)
        versions = [world.candidate(utility) for utility in (0.8, 0.75, 0.55)]
        command = [sys.executable, str(ROOT / "pipelines" / "promote.py"), str(world.recipe)]
        promoters = [
            subprocess.Popen([*command, version], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for version in versions
        ]
        codes = [(promoter.communicate(), promoter.returncode)[1] for promoter in promoters]
        entries = world.ledger().entries()
        utilities = {f"m-candidates/{v}": u for v, u in zip(versions, (0.8, 0.75, 0.55), strict=True)}
        order = [utilities[entry.candidate] for entry in entries]
        assert len(order) == codes.count(0)
        assert all(b >= a - 0.1 for a, b in itertools.pairwise(order)), order
        assert (0.55 in order) == (order[0] == 0.55)  # no champion was there yet, or it did not get in
        assert world.promote("verify") == 0


USERS = ("trainer", "promoter")


@pytest.mark.slow
def test_a_trainer_cannot_promote_nor_touch_a_champion(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    config = tmp_path / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\n"
        "admin_username = admin\nadmin_password = secret-of-admin-1\nauth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )

    def become(user: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"secret-of-{user}-1")

    with running(Server(tmp_path / "server", auth=config)) as server:
        become("admin")
        for user in USERS:
            AuthServiceClient(server.uri).create_user(user, f"secret-of-{user}-1")
        become("trainer")
        world = World(tmp_path, base, server.uri)
        world.candidate(0.8)
        become("promoter")
        assert world.promote() == 0, capsys.readouterr().err
        [entry] = world.ledger().entries()
        assert entry.actor == "promoter"
        become("trainer")
        world.candidate(0.9)
        ledger = world.ledger()
        refused: dict[str, Callable[[], object]] = {
            "alias": lambda: world.target.set_registered_model_alias("m", "champion", "1"),
            "tag": lambda: world.target.set_model_version_tag("m", "1", "manifest", "x"),
            "entry": lambda: ledger.append(entry._replace(seq=2)),
            "version": lambda: world.target.delete_model_version("m", "1"),
            "evidence": lambda: world.target.log_artifact(ledger.run_id, str(world.recipe), entry.evidence),
            "bytes": lambda: world.target.log_model_artifact(
                world.target.get_model_version("m", "1").source.removeprefix("models:/"), str(world.recipe)
            ),
        }
        for name, act in refused.items():
            with pytest.raises((MlflowException, OSError)) as error:
                act()
            assert "403" in str(error.value) or "ermission" in str(error.value), name
        assert world.promote() == 1
        told = capsys.readouterr()
        assert "MLflow refused" in told.err
        become("promoter")
        assert world.promote("verify") == 0
        assert world.champion() == "1"
        everything = "".join(file.read_text(errors="replace") for file in (tmp_path / "runs").rglob("*.json*"))
        assert "secret-of" not in everything + told.out + told.err
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        assert world.promote("verify") == 1
        assert "MLFLOW_TRACKING_USERNAME" in capsys.readouterr().err
