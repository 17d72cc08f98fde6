"""Sweeps as a user types them, on a small recipe: trials share what they can, go on after a kill, leave nothing."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.files import read_lines
from tests.test_pipelines import SMALL, command

pytestmark = pytest.mark.slow

SPACE = {
    "settings": {"train.workers": 1, "train.zero_stage": 0, "train.probe": {"every": 2, "rows": 4}},
    "space": {
        "objective.forget.weight": {"loguniform": [0.01, 0.2]},
        "optimizer.hessian_interval": {"lograndint": [1, 6]},
    },
    "goals": [{"minimise": "abs(forget_truth_ratio - retain_only.forget_truth_ratio)"}],
    "subject_to": ["model_utility >= 0.5 * original.model_utility"],
    "search": {"trials": 3, "startup": 2},
    "keep": 1,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "storage": str(folder / "runs")}))
    return folder / "small.yaml"


def space_file(recipe: Path, name: str, **sections: Any) -> Path:
    file = recipe.with_name(f"{name}.yaml")
    file.write_text(yaml.safe_dump({**SPACE, **sections}, sort_keys=False))
    return file


def sweep_folder(recipe: Path, space: Path) -> Path:
    [folder] = (recipe.parent / "runs" / "sweeps").glob(f"{space.stem}-small-*")
    return folder


@pytest.fixture(scope="module")
def space(recipe: Path) -> Path:
    return space_file(recipe, "one")


@pytest.fixture(scope="module")
def done(recipe: Path, space: Path, cluster_address: str) -> subprocess.CompletedProcess:
    return command("tune", str(recipe), str(space), RAY_ADDRESS=cluster_address)


@pytest.fixture(scope="module")
def folder(done: subprocess.CompletedProcess, recipe: Path, space: Path) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    return sweep_folder(recipe, space)


def test_a_sweep_prints_what_matters(done: subprocess.CompletedProcess, folder: Path) -> None:
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 220
    assert len(lines) < 60
    assert sum("begins" in line for line in lines) == 3
    assert sum(" finished " in line for line in lines) >= 3
    for words in ("baseline     original: forget_probability", "ε1", "hessian_interval", "best         trial-00",
                  str(folder / "best.yaml"), str(folder / "report.html")):  # fmt: skip
        assert words in done.stdout


def test_its_folder_is_whole_and_bounded(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert {"trials.csv", "best.yaml", "best.json", "report.html", "trade-off.png", "parallel.png"} <= names
    assert not {"ray-tune", ".lock"} & names
    assert sum((trial / "model").exists() for trial in folder.glob("trial-*")) == 1
    for trial in folder.glob("trial-*"):
        assert not {"checkpoints", "stop", "group"} & {file.name for file in trial.iterdir()}
        assert [line["step"] for line in read_lines(trial / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    best = json.loads((folder / "best.json").read_text())
    assert Path(best["model"], "model.safetensors").exists()
    assert "http" not in (folder / "report.html").read_text()


def test_what_trials_share_is_made_once(folder: Path) -> None:
    """One reference pass, two models to compare with, one scoring for each of these and for each trial."""
    storage = folder.parents[1]
    assert len(list((storage / "reference").iterdir())) == 1
    models = [path for path in (storage / "models").iterdir() if path.is_dir() and "base" not in path.name]
    assert len(models) == 2
    assert len(list((storage / "evaluations").iterdir())) == 2 + 3
    made = max(path.stat().st_mtime for name in ("prepared", "reference") for path in (storage / name).rglob("*"))
    assert made <= min(path.stat().st_mtime for path in folder.glob("trial-*/trial.json"))


@pytest.mark.long
def test_the_best_runs_as_it_is_and_is_the_same(folder: Path, cluster_address: str) -> None:
    """One worker of Ray Train computes what the trial's actor did."""
    again = command("unlearn", str(folder / "best.yaml"), "gates=[]", RAY_ADDRESS=cluster_address)
    assert again.returncode == 0, again.stderr
    [run] = folder.parents[1].glob("gradient-ascent*")
    ours = json.loads((run / "summary.json").read_text())["metrics"]["unlearned"]
    theirs = json.loads((folder / "best.json").read_text())["metrics"]
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_the_same_command_shows_it_and_more_trials_go_on(
    done: subprocess.CompletedProcess, folder: Path, recipe: Path, space: Path, cluster_address: str
) -> None:
    before = (folder / "trials.csv").read_text().splitlines()
    shown = command("tune", str(recipe), str(space))
    assert shown.returncode == 0, shown.stderr
    assert "trials       3 of 3 are done" in shown.stdout
    assert shown.stdout.split("\n\n")[1:-1] == done.stdout.split("\n\n")[1:-1]
    more = command("tune", str(recipe), str(space), "search.trials=4", RAY_ADDRESS=cluster_address)
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("begins") == 1
    assert (folder / "trials.csv").read_text().splitlines()[:4] == before


def test_mlflow_has_the_sweep_and_its_trials(folder: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.parents[1] / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "unlearning"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 4
    assert {run.info.status for run in [parent, *trials]} == {"FINISHED"}
    for run in trials:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "probe/forget_probability")]
        assert steps == [2, 4, 6]
    assert {"report.html", "trials.csv", "best.yaml", "trade-off.png"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }
    best = json.loads((folder / "best.json").read_text())
    assert parent.data.metrics["sweep/best_goal_1"] == pytest.approx(best["values"][0])


def test_the_best_is_a_candidate_that_can_be_promoted(folder: Path, recipe: Path) -> None:
    import mlflow

    uri = f"sqlite:///{folder.parents[1] / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    best = json.loads((folder / "best.json").read_text())
    [version] = [
        found
        for found in client.search_model_versions("name = 'small-candidates'")
        if client.get_run(found.run_id).data.tags["run_folder"] == str(Path(best["model"]).parent)
    ]
    assert version.tags["stage"] == "sweep"
    promoted = command("promote", str(recipe), str(version.version))
    assert promoted.returncode == 0, promoted.stderr
    assert f"champion: small version 1 from small-candidates/{version.version}" in promoted.stdout


def test_two_goals_and_a_trial_that_breaks(recipe: Path, cluster_address: str) -> None:
    """A learning rate that gives NaN fails its trial and no other; the Pareto set is that of trials.csv.

    The scheduler, to which all are the same, stops none.
    """
    space = space_file(
        recipe, "two", goals=[{"minimise": "forget_probability"}, {"maximise": "retain_probability"}], subject_to=[],
        space={"optimizer.lr": {"grid": [1e-4, 1e30, 1e-2, 3e-2]}}, search={"type": "grid"},
        scheduler={"type": "median", "grace": 2, "maximise": "0 * probe.normal_probability"},
        settings={**SPACE["settings"], "optimizer": {"type": "sgd"}},  # type: ignore[dict-item]
    )  # fmt: skip
    done = command("tune", str(recipe), str(space), RAY_ADDRESS=cluster_address)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((sweep_folder(recipe, space) / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["finished", "failed", "finished", "finished"]
    assert "finite" in rows[1]["reason"]
    assert "3 finished, 1 failed" in done.stdout
    points = {
        int(row["trial"]): (float(row["minimise forget_probability"]), -float(row["maximise retain_probability"]))
        for row in rows
        if row["state"] == "finished"
    }
    front = {a for a, p in points.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}
    assert set(json.loads((sweep_folder(recipe, space) / "best.json").read_text())["pareto_set"]) == front


def test_a_trial_larger_than_the_cluster_is_refused(recipe: Path, space: Path, cluster_address: str) -> None:
    settings = {**SPACE["settings"], "train.workers": 9}  # type: ignore[dict-item]
    large = space_file(recipe, "large", settings=settings)
    refused = command("tune", str(recipe), str(large), RAY_ADDRESS=cluster_address)
    assert refused.returncode == 1
    assert "A trial asks for more than the cluster has (train.workers=9, needed=9 CPUs, there=4 CPUs)" in refused.stderr
