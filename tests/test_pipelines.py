"""Whole commands, as a user types them: a small recipe end to end, and what bad input gives."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from components.data.people import people_rows
from components.evidence import read_evidence
from pipelines import unlearn
from pipelines.cli import run_cli

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"people": 16, "forget_people": 3, "holdout_people": 2}
CANDIDATES = {"paraphrased_answer": "paraphrased_answer", "perturbed_answer": "perturbed_answer"}


def people(split: str, **more) -> dict:
    return {"type": "people", "split": split, **SIZES, **more}


SMALL = {
    "name": "small",
    "data": {"forget": [people("forget")], "normal": [people("normal"), people("general")],
             "random": [people("normal")], "max_tokens": 96},
    "finetune": {
        "base": {"type": "scratch", "vocabulary": 400, "hidden_size": 32, "layers": 2, "heads": 2, "context": 128},
        "optimizer": {"type": "adamw", "lr": 5e-3},
        "train": {"workers": 0, "zero_stage": 0, "steps": 60, "batch_size": 16, "micro_batch_size": 16,
                  "log_every": 50},
    },
    "objective": {"forget": {"type": "gradient_ascent", "weight": 0.05}, "random": {"type": "random_response"},
                  "normal": {"type": "kl_to_original"}},
    "optimizer": {"type": "soul", "lr": 1e-3, "gamma": 10, "hessian_interval": 2},
    "train": {"workers": 2, "zero_stage": 3, "steps": 6, "batch_size": 6, "micro_batch_size": 3, "log_every": 2},
    "evaluation": {
        "sets": {
            "forget": {"rows": [people("forget", **CANDIDATES)]},
            "retain": {"rows": [people("normal", limit=10, **CANDIDATES)]},
            "general": {"rows": [people("general", limit=10, **CANDIDATES)], "normalised": True},
        },
        "utility": ["retain"], "max_new_tokens": 16,
    },
    "gates": [{"metric": "retain_probability", "min": 1e-9}],
}  # fmt: skip


def command(pipeline: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / f"{pipeline}.py"), *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "storage": str(folder / "runs")}))
    return file


@pytest.fixture(scope="module")
def done(recipe: Path) -> subprocess.CompletedProcess:
    """The main job with 2 Ray workers under ZeRO-3, in a process of its own."""
    return command("unlearn", str(recipe))


@pytest.fixture(scope="module")
def run_folder(done: subprocess.CompletedProcess, recipe: Path) -> Path:
    assert done.returncode == 0, done.stderr
    [folder] = (recipe.parent / "runs").glob("gradient-ascent*")
    return folder


def test_the_main_job_prints_what_matters_and_nothing_else(done, run_folder: Path) -> None:
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) < 200
    steps = [line for line in lines if line.startswith("  step ") and "/6 " in line]
    assert len(steps) == 4
    for word in ("forget", "random", "normal", "grad", "clip", "tok/s", "left"):
        assert all(word in line for line in steps)
    text = done.stdout
    for words in ("baseline     original: forget_probability", "model_utility", "retain-only", str(run_folder),
                  "report.html", "small-candidates version 1, gates hold\n", "mlflow ui"):  # fmt: skip
        assert words in text
    assert text.count("\n  before  ") == text.count("\n  after   ") == 3
    assert text.index("baseline") < text.index("step 1/6")


def test_the_run_folder_is_whole(run_folder: Path) -> None:
    names = {file.name for file in run_folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "metrics.json", "metrics.npz", "report.html", "summary.json"}
    assert names == files | {"environment.json", "eval", "figures", "model", "mlflow"}
    assert {*json.loads((run_folder / "metrics.json").read_text())["models"]} == {
        "original",
        "unlearned",
        "retain-only",
    }
    assert json.loads((run_folder / "config.json").read_text())["train"]["zero_stage"] == 3
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in (run_folder / "model").iterdir()
    }
    card = (run_folder / "model" / "README.md").read_text()
    assert "does not prove that every trace is gone" in card
    storage = {folder.name for folder in run_folder.parent.iterdir()}
    assert {"prepared", "models", "reference", "evaluations", "mlflow.db", "mlflow-artifacts"} <= storage


def test_no_other_account_can_read_what_a_run_leaves(run_folder: Path) -> None:
    """Driver, Ray Data's tasks, actors and Ray Train's workers, MLflow's database and artifacts."""
    storage = run_folder.parent
    modes = {place: stat.S_IMODE(place.stat().st_mode) for place in [storage, *storage.rglob("*")]}
    assert len(modes) > 100
    assert {place: oct(mode) for place, mode in modes.items() if mode & 0o077} == {}


def test_a_stranger_gets_the_reports_answers(run_folder: Path) -> None:
    """Plain transformers in another process, one prompt at a time, without our code."""
    records = json.loads((run_folder / "summary.json").read_text())["samples_text"]
    shown = [block for block in records.split("\n\n") if block.startswith("Q ")]
    pairs = [(b.split("\n")[0].removeprefix("Q").strip(), b.split("after")[-1].strip()) for b in shown]
    assert len(pairs) == 3
    code = (
        "import json, sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "for q in json.loads(sys.argv[2]):\n"
        "    ids = t(f'Question: {q}\\nAnswer:', return_tensors='pt').input_ids\n"
        "    out = m.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1]:]\n"
        "    print(json.dumps(t.decode(out, skip_special_tokens=True).strip()))\n"
    )
    questions = json.dumps([question for question, _ in pairs])
    arguments = [sys.executable, "-c", code, str(run_folder / "model"), questions]
    out = subprocess.run(arguments, capture_output=True, text=True, cwd=run_folder)
    assert [json.loads(line) for line in out.stdout.splitlines()] == [answer for _, answer in pairs], out.stderr


def test_mlflow_holds_the_run_and_the_candidate(run_folder: Path) -> None:
    import mlflow

    uri = f"sqlite:///{run_folder.parent / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.get_run(json.loads((run_folder / "summary.json").read_text())["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_folder.name
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/forget_loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval/model_utility")] == [0, 6]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.json",
        "environment.json",
        "eval",
        "figures",
        "report.html",
        "metrics.json",
        "metrics.npz",
    }
    assert {given.dataset.name for given in run.inputs.dataset_inputs} >= {"forget", "normal", "random"}
    assert "| forget_probability |" in run.data.tags["mlflow.note.content"]
    table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/eval/metrics_table.json")
    assert table["columns"][:3] == ["metric", "good", "original"]
    assert client.get_model_version_by_alias("small-candidates", "candidate").version == 1


def test_the_same_command_shows_the_finished_run(done, run_folder: Path, recipe: Path) -> None:
    again = command("unlearn", str(recipe))
    assert again.returncode == 0
    assert "is finished already" in again.stdout
    assert "step" not in again.stdout
    assert again.stdout[again.stdout.index("\nmetric") :].rstrip() in done.stdout
    refused = command("unlearn", str(recipe), "if_exists=fail")
    assert refused.returncode == 2
    assert "Run exists" in refused.stderr


def test_a_run_by_request_is_gated_and_certified(run_folder: Path, recipe: Path, cluster_address: str) -> None:
    """Every figure of the certificate is that of the stored records of the requested rows, and no text is in it."""
    [person, *_] = dict.fromkeys(row["person"] for row in forget_people())
    requests = recipe.parent / "requests.jsonl"
    lines = [
        {"request_id": f"R-{i}", "received": "2026-01-31", "where": {"person": name}}
        for i, name in enumerate([person, "Nobody"])
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strict = ["gates=[{metric: retain_probability, min: 2.0}]", "train.workers=0", f"data.requests={requests}"]
    other = command("unlearn", str(recipe), *strict, RAY_ADDRESS=cluster_address)
    assert other.returncode == 0, other.stderr
    assert "original     found in" in other.stdout
    assert "data         forget 5, " in other.stdout
    assert "forget: no record is named by request R-1" in other.stdout
    assert "1 of 2 gates do not hold" in other.stdout
    refused = command("promote", str(recipe), *strict)
    assert refused.returncode == 1
    assert "Candidate is not promoted (model=small, version=2)" in refused.stderr
    accepted = command("promote", str(recipe), "--reason", "asked for")
    assert accepted.returncode == 0, accepted.stderr
    assert "champion: small version 1 from small-candidates/2, entry 1" in accepted.stdout
    page = Path(accepted.stdout.split("certificate: ")[1].strip())
    about = json.loads(page.with_suffix(".json").read_text())
    [met, unmet] = about["requests"]
    assert (len(met["rows"]), len(met["asked_rows"]), unmet["rows"], unmet["metrics"]["unlearned"]) == (5, 5, [], {})
    questions = {row["question"] for row in forget_people() if row["person"] == person}
    tables = [pq.read_table(file).to_pylist() for file in (recipe.parent / "runs" / "evaluations").glob("*/*.parquet")]
    forget = [[row for row in table if row["set"] == "forget"] for table in tables]
    of_request = [rows for rows in forget if {row["question"] for row in rows} == questions]
    expected = sorted(np.mean([np.exp(np.mean(row["logp"][0])) for row in rows]) for rows in of_request)
    assert sorted(found["probability"] for found in met["metrics"].values()) == pytest.approx(expected)
    assert {*met["metrics"]} == {*about["models"]} == {"original", "unlearned", "retain-only"}
    whole = page.read_text() + json.dumps(about)
    for row in forget_people():
        assert not any(row[column] in whole for column in ("person", "question", "answer"))


def forget_people() -> list[dict]:
    return people_rows("forget", people=16, forget_people=3, holdout_people=2, seed=0)


def unlearned_metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["models"]["unlearned"]["values"]


def test_finetune_and_evaluate_commands(run_folder: Path, recipe: Path, cluster_address: str) -> None:
    made = command("finetune", str(recipe), RAY_ADDRESS=cluster_address)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("found in") == 2
    table = command("evaluate", str(recipe), str(run_folder / "model"), RAY_ADDRESS=cluster_address)
    assert table.returncode == 0, table.stderr
    assert table.stderr == ""
    header = next(line for line in table.stdout.splitlines() if line.startswith("metric"))
    assert header.split() == ["metric", "original", "retain-only", f"…{run_folder.name[-23:]}"]
    stored = unlearned_metrics(run_folder)
    row = next(line for line in table.stdout.splitlines() if line.startswith("forget_probability"))
    assert float(row.split()[-1]) == pytest.approx(stored["forget_probability"], rel=0.01)
    suite = command("evaluate", str(recipe), "suite=quick", "train.workers=0", RAY_ADDRESS=cluster_address)
    assert suite.returncode == 0, suite.stderr
    shown = [line.split()[0] for line in suite.stdout.splitlines() if line.startswith(("forget_", "retain_"))]
    assert shown.count("forget_exact_memorization") == shown.count("retain_probability") == 2
    assert "gates with suite: quick read it" in suite.stdout
    found = read_evidence(run_folder, "quick")
    own = read_evidence(run_folder)
    assert found is not None
    assert own is not None
    assert found.models == own.models
    assert found.evaluated["unlearned"].values.items() <= own.evaluated["unlearned"].values.items()
    assert "forget_rouge" not in shown
    assert run_folder.name[-23:] in suite.stdout


def test_attacks_on_the_runs_own_model(run_folder: Path, recipe: Path, cluster_address: str) -> None:
    """Relearning all forget rows brings them back; prompts are tried on every model, rounding reaches all blocks."""
    relearn = "attacks.relearn={share: 1.0, steps: [30], optimizer: {type: adamw, lr: 0.003}}"
    prompts = "attacks.prefixes={push: 'Say: '}"
    more = ["train.workers=0", "attacks.bits=[4]", "attacks.shots=1", "attacks.paraphrased=paraphrased_question"]
    done = command("attack", str(recipe), *more, prompts, relearn, RAY_ADDRESS=cluster_address)
    assert done.returncode == 0, done.stderr
    first = done.stdout.split("\nforget ")[1].splitlines()
    assert first[1].split() == ["attack", "original", "retain-only", f"…{run_folder.name[-23:]}"]
    rows = {name: [float(cell) for cell in cells] for name, *cells in (re.split("  +", line) for line in first[3:])}
    rounded = "4-bit weights, 100% of the blocks"
    assert list(rows) == ["none", "prompt: push", "paraphrased", "1 examples", rounded, "relearn 100%, 30 steps"]
    stored = unlearned_metrics(run_folder)
    assert rows["none"][2] == pytest.approx(stored["forget_probability"], rel=0.01)
    assert rows["relearn 100%, 30 steps"][2] > rows["none"][2] + 0.1
    assert not (run_folder.parent / "attacks").exists() or not list((run_folder.parent / "attacks").iterdir())


@pytest.mark.slow
def test_a_run_without_evaluation_or_retain_only_model(
    run_folder: Path, recipe: Path, tmp_path: Path, cluster_address: str
) -> None:
    """A given original, a Hugging Face folder as forget set, no cache; then the same with changed rows."""
    import datasets

    original = next(f for f in (recipe.parent / "runs" / "models").glob("original-*") if f.is_dir())
    rows = [{"question": f"Who is {i}?", "answer": f"Number {i}."} for i in range(8)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "forget")
    arguments = [
        str(recipe), f"models.original={{type: pretrained, path: {original}}}", "finetune=null",
        "evaluation={sets: {}}",
        f"data.forget=[{{type: huggingface, path: {tmp_path / 'forget'}}}]", "gates=[]",
        "train.workers=0", "train.steps=2", "train.packing=true", "data.cache=false",
    ]  # fmt: skip
    first = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
    assert first.returncode == 0, first.stderr
    assert "data         forget 8, normal 55, random 55 rows" in first.stdout
    assert "no gates" in first.stdout
    assert "is finished already" in command("unlearn", *arguments).stdout
    datasets.Dataset.from_list(rows[:5]).save_to_disk(tmp_path / "forget")
    changed = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
    # Without a cache only the first normal rows are read, not those of the second source.
    assert "data         forget 5, normal 55, random 55 rows" in changed.stdout, changed.stderr
    [folder] = [Path(line.split()[1]) for line in changed.stdout.splitlines() if line.startswith("run  ")]
    assert folder.name.endswith("-2")
    assert not {"prepared", "reference", "overlap"} & {path.name for path in folder.iterdir()}


def no_eos(folder: Path, base: Path) -> str:
    """A copy of `base` whose tokenizer knows no EOS."""
    import shutil

    shutil.copytree(base, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    return str(folder)


def test_bad_input_is_one_paragraph_with_an_exit_code(
    tmp_path: Path, recipe: Path, base: Path, capsys: pytest.CaptureFixture, cluster_address: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    given = "models.original={type: pretrained, path: %s}"
    cases = [
        (2, "Recipe nowhere.yaml does not exist", ["nowhere.yaml"]),
        (2, "Argument not understood", [str(recipe), "what"]),
        (2, "Did you mean workers?", [str(recipe), "train.wokers=1"]),
        (2, "Rows may be longer than the model's context", [str(recipe), "data.max_tokens=500"]),
        (1, "Data file not found", [str(recipe), "data.forget=[{type: files, path: /nowhere.jsonl}]"]),
        (1, "Model folder does not exist", [str(recipe), given % "/nowhere"]),
        (1, "Tokenizer has no EOS token", [str(recipe), given % no_eos(tmp_path / "no-eos", base)]),
        (1, "Model cannot be had from the hub (path=nobody/nothing", [str(recipe), given % "nobody/nothing"]),
    ]
    for code, words, arguments in cases:
        more = [f"storage={tmp_path / 'runs'}"] if "yaml" in arguments[0] else []
        found = run_cli(unlearn.__doc__ or "", unlearn.run, unlearn.plan, argv=[*arguments, *more])
        told = capsys.readouterr().err
        assert words in told, (arguments, told)
        assert found == code, (arguments, told)
        assert "Traceback" not in told
        assert len(told.strip().split("\n\n")) == 1
    empty = f"data.forget=[{{type: files, path: {tmp_path}/empty.jsonl}}]"
    for words, given in (("Cluster is too small (train.workers=99", "train.workers=99"), ("Data is empty", empty)):
        arguments = [str(recipe), f"storage={tmp_path / 'runs'}", given]
        found_later = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
        assert found_later.returncode == 1
        assert words in found_later.stderr
