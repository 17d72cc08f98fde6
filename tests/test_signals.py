"""Requests to stop: what process managers send is one request, whoever is in charge when its parts come."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components import process
from components.config import AdamW, Nll, Objective, Train
from components.errors import Stopped
from components.training import launch
from components.training.job import Job
from pipelines import cli
from pipelines.sweeps import driver
from tests.training import events

ROOT = Path(__file__).resolve().parents[1]
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Time for requests goes on only when told; handlers are put back."""
    now = [1000.0]
    before = {number: signal.getsignal(number) for number in (TERM, INT)}
    monkeypatch.setattr(process, "_requested", 0.0)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yield lambda seconds: now.__setitem__(0, now[0] + seconds)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(clock: Callable[[float], None], signals: list[tuple[float, int]]) -> None:
    """Each so many seconds after the one before."""
    for after, number in signals:
        clock(after)
        signal.raise_signal(number)


def training(folder: Path) -> tuple[Any, Callable[[], bool]]:
    job = Job(
        model="m", output="o", metrics="x", stop=str(folder / "stop"), events=str(folder / "events.jsonl"), normal="n",
        objective=Objective(normal=Nll(type="nll")), optimizer=AdamW(type="adamw"), train=Train(workers=0), seed=0,
    )  # fmt: skip
    return launch._signals_stop(job), lambda: [event["event"] for event in events(job)] == ["stop"]


def sweep(folder: Path) -> tuple[Any, Callable[[], bool]]:
    trial = SimpleNamespace(folder=folder, state="running")
    return driver._signals_stop(SimpleNamespace(trials=lambda: [trial])), (folder / "stop").exists  # type: ignore[arg-type]


ONCE = [
    [(0, TERM), (0, TERM)],
    [(0, TERM), (0.9, TERM)],
    [(0, INT), (0.2, INT)],
    [(0, TERM), (0.1, INT)],
    [(0, TERM), (1, TERM), (1, TERM), (0.9, TERM)],
]
TWICE = [[(0, TERM), (3.1, TERM)], [(0, INT), (5, INT)], [(0, TERM), (0.5, TERM), (60, TERM)], [(0, INT), (4, TERM)]]


@pytest.mark.parametrize("signals", ONCE)
def test_training_takes_what_comes_within_seconds_for_one_request(
    tmp_path: Path, clock: Callable[[float], None], signals: list[tuple[float, int]]
) -> None:
    inside, asked_once = training(tmp_path)
    with inside as caught:
        send(clock, signals)
    assert caught == [signals[0][1]]
    assert (tmp_path / "stop").exists()
    assert asked_once()


@pytest.mark.parametrize("signals", TWICE)
def test_a_later_signal_stops_training_at_once(
    tmp_path: Path, clock: Callable[[float], None], signals: list[tuple[float, int]]
) -> None:
    inside, _ = training(tmp_path)
    with pytest.raises(Stopped, match="Stopped at once") as stopped, inside:
        send(clock, signals)
    assert stopped.value.signal == signals[-1][1]


@pytest.mark.parametrize("signals", [*ONCE, *TWICE])
def test_a_sweep_waits_for_its_trials_unless_asked_again(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, signals: list[tuple[float, int]]
) -> None:
    """The others come while the first one's handler waits; when all have come, the trial's checkpoint is written."""
    inside, asked = sweep(tmp_path)
    left = list(signals[1:])
    waited = []

    def sleep(seconds: float) -> None:
        assert asked()
        if left:
            send(clock, [left.pop(0)])
        else:
            waited.append(True)
            (tmp_path / "stop").unlink()

    monkeypatch.setattr(driver, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(Stopped, match="the same command") as stopped, inside:
        signal.raise_signal(signals[0][1])
    assert stopped.value.signal == signals[0][1]
    assert bool(waited) == (signals in ONCE)


@pytest.mark.parametrize("signals", [*ONCE, *TWICE])
@pytest.mark.parametrize("in_training", [True, False])
def test_the_way_out_is_not_disturbed_by_the_same_request(
    tmp_path: Path, clock: Callable[[float], None], signals: list[tuple[float, int]], in_training: bool
) -> None:
    """Also where the first part came to training, and the rest comes when the command tidies up after it."""
    signal.signal(INT, signal.default_int_handler)
    tidied = []

    def act() -> None:
        try:
            if in_training:
                with training(tmp_path)[0]:
                    send(clock, signals[:1])
                raise Stopped("Stopped after step 3.", signals[0][1])
            send(clock, signals[:1])
        finally:
            send(clock, signals[1:])
            tidied.append(1)

    expected = signals[0][1] if signals in ONCE else signals[-1][1]
    assert cli.exit_code(act, debug=False) == 128 + expected
    assert bool(tidied) == (signals in ONCE)


COMPARES = """
import signal, sys, time
from pathlib import Path
from pipelines import cli, compare

compare.__file__ = sys.argv[1]
sys.exit(cli.exit_code(lambda: print(compare._unlearn([sys.argv[2]])), debug=False))
"""
TRAINS = """
import signal, sys, time
from pathlib import Path
from pipelines import cli

def act():
    Path(sys.argv[1]).write_text("begun")
    try:
        time.sleep(60)
    finally:
        time.sleep(0.8)
        Path(sys.argv[1]).write_text("saved")

sys.exit(cli.exit_code(act, debug=False))
"""


@pytest.mark.parametrize("to", [["process"], ["process", "group"], ["group"], ["child"], ["process", "group", "group"]])
def test_a_comparison_waits_for_the_end_of_its_run(tmp_path: Path, to: list[str]) -> None:
    (tmp_path / "unlearn.py").write_text(TRAINS)
    done = tmp_path / "done"
    command = [sys.executable, "-c", COMPARES, str(tmp_path / "compare.py"), str(done)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as running:
        while not done.exists() or not done.read_text():
            time.sleep(0.02)
        for target in to:
            if target == "child":
                import psutil

                psutil.Process(running.pid).children()[0].terminate()
            else:
                (os.killpg if target == "group" else os.kill)(running.pid, TERM)
            time.sleep(0.1)
        assert running.wait(30) == 143
    assert done.read_text() == "saved"
