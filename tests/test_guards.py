"""A model that does worse on what it must keep than a guess would: noticed, stopped, reported."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from components.config import AdamW, GradientAscent, JensenShannon, KlToOriginal, Nll, Objective, RandomResponse, Soul
from components.training.guards import worse_than_guessing
from components.training.job import Job
from components.training.launch import run_job
from tests.test_checkpoint import GRAD_DIFF
from tests.test_pipelines import SMALL, command, people
from tests.training import SOUL, TRAIN, events, lines, run

ASCENT, KL = GradientAscent(type="gradient_ascent"), KlToOriginal(type="kl_to_original")


def test_the_bound_is_the_loss_of_a_uniform_guess() -> None:
    """Of any original distribution the KL to the uniform one is at most ln V, and ln V only of a certain one."""
    vocabulary = 50
    p = torch.distributions.Dirichlet(torch.full((vocabulary,), 0.1)).sample((100,))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=p), torch.distributions.Categorical(logits=torch.zeros(100, vocabulary))
    )
    guess = math.log(vocabulary)
    assert kl.max() <= guess
    objective = Objective(forget=ASCENT, normal=KL)
    assert worse_than_guessing(objective, {"train/normal_loss": guess}, vocabulary) is None
    assert "guessing" in str(worse_than_guessing(objective, {"train/normal_loss": guess * 1.001}, vocabulary))


@pytest.mark.parametrize(
    ("objective", "metrics", "worse"),
    [
        (Objective(forget=ASCENT, normal=Nll(type="nll")), {"train/normal_loss": 9.0}, True),
        (Objective(random=RandomResponse(type="random_response"), normal=KL), {"train/normal_loss": 9.0}, True),
        (Objective(forget=ASCENT, normal=KL), {"train/normal_loss": math.inf}, True),
        (Objective(forget=ASCENT), {"probe/normal_probability": 1e-4}, True),
        (Objective(forget=ASCENT), {"probe/normal_probability": 0.0}, True),
        (Objective(forget=ASCENT), {"probe/normal_probability": 0.5}, False),
        (Objective(forget=ASCENT), {"train/forget_loss": -90.0}, False),
        (Objective(normal=Nll(type="nll")), {"train/normal_loss": 9.0}, False),  # learns from scratch
        (Objective(forget=ASCENT, normal=JensenShannon(type="jensen_shannon")), {"train/normal_loss": 9.0}, False),
    ],
)
def test_only_what_says_so_is_a_collapse(objective: Objective, metrics: dict[str, float], worse: bool) -> None:
    assert bool(worse_than_guessing(objective, metrics, 400)) == worse


def test_rows_that_are_yet_to_be_learnt_are_no_collapse() -> None:
    """An original that knows nothing of the normal rows begins worse than guessing, and gets better."""
    objective, bad = Objective(forget=ASCENT, normal=Nll(type="nll")), {"train/normal_loss": 9.0}
    assert worse_than_guessing(objective, bad, 400, at_start=9.5) is None
    assert worse_than_guessing(objective, bad, 400, at_start=8.5)


def ruined(make_job: Any, name: str, **train: Any) -> Job:
    """A job that throws its model away."""
    settings = {"steps": 12, "micro_batch_size": 8, **train}
    job = make_job(
        name, TRAIN.model_copy(update=settings), random=None, optimizer=AdamW(type="adamw", lr=0.5),
        objective=Objective.model_validate({**GRAD_DIFF, "forget": {"type": "gradient_ascent", "weight": 50.0}}),
    )  # fmt: skip
    return job.model_copy(update={"events": f"{job.output}.events", "checkpoints": f"{job.output}-checkpoints"})


def test_a_collapsed_run_stops_and_says_since_when(make_job: Any, tmp_path: Path) -> None:
    job = ruined(make_job, "ruined", checkpoint_every=1)
    outcome = run_job(job, tmp_path)
    since = outcome["collapsed_since"]
    assert since is not None
    assert outcome["steps"] == since + 2 == len(lines(job)) < 12
    losses = [line["train/normal_loss"] for line in lines(job)]
    assert all(loss > math.log(400) for loss in losses[since - 1 :])
    assert losses[since - 2] <= math.log(400)
    told = [event["text"] for event in events(job) if event["event"] == "collapse"]
    assert [
        text.startswith(f"step {step}: the model collapses")
        for text, step in zip(told, (since, since + 2), strict=True)
    ]
    assert told[1].endswith("training stops")
    # One that was killed before the model was written stops there again.
    again = job.model_copy(update={"output": f"{job.output}-again"})
    assert run_job(again, tmp_path)["collapsed_since"] == since
    assert len(lines(job)) == since + 2
    to_the_end = run_job(ruined(make_job, "whole", stop_collapsed=None), tmp_path)
    assert to_the_end["steps"] == 12
    assert to_the_end["collapsed_since"] is not None


def test_a_sound_run_is_none(make_job: Any, tmp_path: Path) -> None:
    job = make_job("sound", TRAIN, optimizer=SOUL)
    assert isinstance(job.optimizer, Soul)
    assert run_job(job, tmp_path)["collapsed_since"] is None
    assert run(job.model_copy(update={"train": job.train.model_copy(update={"stop_collapsed": None})}), tmp_path)


def small(folder: Path, **sections: Any) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "storage": str(folder / "runs"), **sections}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ruin", "told"),
    [
        (["objective.forget.weight=50", "optimizer.lr=0.5", "train.steps=12"], "collapsed: from step"),
        (
            ["optimizer.lr=3.4e38", "optimizer.weight_decay=0.9", "train.steps=1"],
            "cannot be evaluated: Model gives numbers that are not finite",
        ),
    ],
)
def test_a_ruined_model_gets_a_report_and_no_promotion(
    tmp_path: Path, cluster_address: str, ruin: list[str], told: str
) -> None:
    arguments = [str(small(tmp_path)), "train.workers=0", "train.gradient_clipping=0", *ruin]
    done = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    [folder] = (tmp_path / "runs").glob("gradient-ascent*")
    assert told in (folder / "report.html").read_text()
    assert json.loads((folder / "summary.json").read_text())["version"] == "1"
    again = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
    assert again.returncode == 0
    assert told in again.stdout
    promoted = command("promote", *arguments)
    assert promoted.returncode == 1
    assert "FAIL" in promoted.stdout


@pytest.mark.slow
@pytest.mark.parametrize("quality", [[], [{"metric": "forget_quality", "min": 0.05}]])
def test_a_run_that_does_nothing_is_not_promoted(tmp_path: Path, cluster_address: str, quality: list[Any]) -> None:
    """One row to forget, one step that moves nothing: the model answers as before, whatever gates the recipe has."""
    forget = people("forget", limit=1)
    candidates = {"paraphrased_answer": "paraphrased_answer", "perturbed_answer": "perturbed_answer"}
    evaluation = json.loads(json.dumps(SMALL["evaluation"]))
    evaluation["sets"]["forget"]["rows"] = [people("forget", limit=1, **candidates)]
    gates = [*quality, {"metric": "model_utility", "min_ratio": 0.9, "of": "original"}]
    recipe = small(tmp_path, data={**SMALL["data"], "forget": [forget]}, evaluation=evaluation, gates=gates)
    arguments = [str(recipe), "train.workers=0", "train.steps=1", "optimizer.lr=1e-9"]
    done = command("unlearn", *arguments, RAY_ADDRESS=cluster_address)
    assert done.returncode == 0, done.stderr
    assert f"{1 + len(quality)} of {2 + len(quality)} gates do not hold" in done.stdout
    promoted = command("promote", *arguments)
    assert promoted.returncode == 1
    assert "forget_similarity" in promoted.stdout
    assert ("1 forget rows are too few" in promoted.stdout) == bool(quality)
