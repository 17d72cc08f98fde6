"""Sweeps whose processes are killed, for real: nothing is lost, nothing is left, the next trial starts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from components.files import read_lines
from tests.test_pipelines import ROOT, SMALL
from tests.test_tuning_trials import SPACE

pytestmark = pytest.mark.faults
STEPS = 60
LONG = {"train.steps": 400}  # more than a trial can do between its driver's death and its own
TRAIN = {**SMALL["train"], "steps": STEPS, "log_every": 50}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "train": TRAIN, "storage": str(folder / "runs")}))
    return folder / "small.yaml"


def space_file(recipe: Path, name: str, settings: dict[str, Any], **sections: Any) -> Path:
    file = recipe.with_name(f"{name}.yaml")
    every = {"train.checkpoint_every": 5, "train.probe": {"every": 5, "rows": 4}}
    file.write_text(
        yaml.safe_dump({**SPACE, "settings": {**SPACE["settings"], **every, **settings}, **sections})  # type: ignore[dict-item]
    )
    return file


class Typed:
    """A sweep in a process of its own with a Ray of its own, whose output is read while it goes on."""

    def __init__(self, recipe: Path, space: Path, *more: str):
        self.log = space.with_suffix(".log")
        self.mark = f"TUNING_{os.getpid()}_{time.monotonic_ns()}"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        arguments = [sys.executable, str(ROOT / "pipelines" / "tune.py"), str(recipe), str(space), *more]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                arguments, stdout=out, stderr=out, env={**environment, self.mark: "1"}, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until(self, reached: Callable[[], Any], patience: float = 240) -> Any:
        deadline = time.monotonic() + patience
        while not (found := reached()):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        return found

    def ended(self, patience: float = 400) -> str:
        assert self.process.wait(patience) == 0, self.text
        return self.text

    def descendants(self) -> list[psutil.Process]:
        """All processes that this command began, wherever they hang now."""
        found = []
        for process in psutil.process_iter():
            try:
                if self.mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def nothing_is_left(self, patience: float = 30) -> None:
        deadline = time.monotonic() + patience
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, [process.cmdline() for process in left]


def the_sweep(recipe: Path, space: Path) -> Path:
    found = list((recipe.parent / "runs" / "sweeps").glob(f"{space.stem}-small-*"))
    return found[0] if found else recipe.parent / "nowhere"


def steps_of(recipe: Path, space: Path, number: int) -> int:
    return len(read_lines(the_sweep(recipe, space) / f"trial-{number:03d}" / "metrics.jsonl"))


def results(recipe: Path, space: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(the_sweep(recipe, space).glob("trial-*/result.json"))]


def params(recipe: Path, space: Path) -> list[dict[str, Any]]:
    files = sorted(the_sweep(recipe, space).glob("trial-*/trial.json"))
    return [json.loads(file.read_text())["params"] for file in files]


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """An undisturbed sweep, one trial after the other."""
    space = space_file(recipe, "straight", LONG, concurrent=1)
    Typed(recipe, space).ended()
    return space


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_the_driver_is_killed_and_the_same_command_goes_on(recipe: Path, straight: Path, number: int) -> None:
    """The second trial goes on from a checkpoint; trials, metrics and the best are those of an undisturbed sweep.

    After a SIGTERM or Ctrl-C that is the one written because of it.
    """
    only_when_asked = {"train.checkpoint_every": 1000} if number != signal.SIGKILL else {}
    space = space_file(recipe, f"killed-{number}", {**LONG, **only_when_asked}, concurrent=1)
    first = Typed(recipe, space)
    first.until(lambda: steps_of(recipe, space, 1) > 20)
    first.process.send_signal(number)
    if number != signal.SIGKILL:  # as `timeout` does: to the process, then to its group
        os.killpg(first.process.pid, number)
    assert first.process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    first.nothing_is_left()
    assert len(results(recipe, space)) == 1
    again = Typed(recipe, space)
    text = again.ended()
    again.nothing_is_left()
    assert "1 of 3 are done, 1 are gone on with" in text
    assert "trial-000 begins" not in text
    events = read_lines(the_sweep(recipe, space) / "trial-001" / "events.jsonl")
    assert [event["event"] for event in events if event["event"] == "resumed"] == ["resumed"]
    assert params(recipe, space) == params(recipe, straight)
    ours, theirs = results(recipe, space), results(recipe, straight)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["metrics"] == pytest.approx(its["metrics"], abs=1e-9)


def trial_actors(typed: Typed) -> list[psutil.Process]:
    return [process for process in typed.descendants() if "ray::ResourceTrainable" in " ".join(process.cmdline())]


def test_a_killed_trial_is_recorded_and_the_others_go_on(recipe: Path) -> None:
    space = space_file(recipe, "lost", {}, concurrent=1)
    typed = Typed(recipe, space)
    typed.until(lambda: steps_of(recipe, space, 0) > 10)
    [actor] = trial_actors(typed)
    actor.kill()
    began = time.monotonic()
    typed.until(lambda: steps_of(recipe, space, 1) > 0)
    assert time.monotonic() - began < 60
    text = typed.ended()
    typed.nothing_is_left()
    assert [result["state"] for result in results(recipe, space)] == ["failed", "finished", "finished"]
    assert "process ended" in results(recipe, space)[0]["reason"]
    assert "2 finished, 1 failed" in text


@pytest.mark.long
def test_a_killed_trial_of_two_workers_frees_their_place(recipe: Path) -> None:
    """The cluster holds one such trial: the next one starts only when the placement group of the first is gone."""
    space = space_file(recipe, "nested", {"train.workers": 2}, search={"trials": 2, "startup": 2})
    typed = Typed(recipe, space)
    typed.until(lambda: steps_of(recipe, space, 0) > 10)
    [actor] = trial_actors(typed)
    actor.kill()
    began = time.monotonic()
    typed.until(lambda: steps_of(recipe, space, 1) > 0, patience=90)
    assert time.monotonic() - began < 60
    typed.ended()
    typed.nothing_is_left()
    assert [result["state"] for result in results(recipe, space)] == ["failed", "finished"]


@pytest.mark.long
def test_a_trial_of_two_workers_that_is_stopped_early_leaves_nothing(recipe: Path) -> None:
    """ASHA stops the worse of two; workers and placement group are gone, and a third trial starts in their place."""
    space = space_file(
        recipe, "early", {"train.workers": 2}, search={"type": "grid"},
        space={"objective.forget.weight": {"grid": [0.2, 0.001, 0.19]}},
        scheduler={"type": "asha", "grace": 10, "reduction": 2, "maximise": "-probe.forget_probability"},
    )  # fmt: skip
    typed = Typed(recipe, space)
    typed.until(lambda: (the_sweep(recipe, space) / "trial-001" / "result.json").exists())
    began = time.monotonic()
    stopped = json.loads((the_sweep(recipe, space) / "trial-001" / "result.json").read_text())
    assert stopped["state"] == "stopped"
    typed.until(lambda: steps_of(recipe, space, 2) > 0, patience=90)
    assert time.monotonic() - began < 60
    workers = [p for p in typed.descendants() if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    assert 10 <= steps_of(recipe, space, 1) < STEPS
    assert not (the_sweep(recipe, space) / "trial-001" / "checkpoints").exists()
    typed.ended()
    typed.nothing_is_left()
