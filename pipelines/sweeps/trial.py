"""One trial of a sweep: train as unlearn.py does, evaluate, judge. Runs in a Tune actor, which serves many trials.

A job of one worker is trained by the actor itself; one of more workers starts Ray Train from there.
"""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from components.config import Recipe
from components.errors import own_error
from components.files import read_lines, write_whole
from components.models import fingerprint
from components.process import keep_private
from components.training.job import Job
from components.training.launch import run_job
from components.tuning.spaces import judged, own_point, recipe_of
from components.tuning.trials import end_trial, reports, trial_folder
from pipelines.evaluate import evaluate_model, retain_reference, score_model, score_models
from pipelines.finetune import Model
from pipelines.sweeps.shared import Shared, alone, clear, in_process, read_shared, trial_job

_LOOK = 0.2  # seconds between two looks at what training has written


def run_trial(sweep: Path, number: int) -> None:
    """Train and judge a trial, or go on with it. Writes `result.json` unless it is stopped or this process dies."""
    folder, shared = trial_folder(sweep, number), read_shared(sweep)
    try:
        recipe = recipe_of(shared.recipe, json.loads((folder / "trial.json").read_text(encoding="utf-8"))["params"])
        write_whole(folder / "config.json", recipe.model_dump_json(indent=2))
        if in_process(recipe):
            recipe = alone(recipe)
        job = trial_job(recipe, folder, shared)
        _train(job, folder)
        evaluated_in = time.perf_counter()
        metrics = _evaluate(recipe, folder, shared)
        about = judged(shared.space, metrics, shared.metrics)
    except Exception as error:
        own = own_error(error)
        told = str(own) if own else f"{type(error).__name__}: {error}"
        end_trial(folder, "failed", reason=" ".join(told.split())[:500])
        return
    lines = read_lines(folder / "metrics.jsonl")
    seconds = {
        "train": sum(line["perf/step_seconds"] for line in lines), "evaluate": time.perf_counter() - evaluated_in,
    }  # fmt: skip
    end_trial(folder, "finished", metrics=metrics, seconds=seconds, **about)
    clear(folder, recipe)


def _train(job: Job, folder: Path) -> None:
    if (folder / "trained.json").exists():
        return
    if job.train.workers == 0:
        import torch

        from components.batch_inference import hide_gpus

        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))  # as in a worker of Ray Train
        if not job.train.gpus_per_worker:
            hide_gpus()
    outcome = run_job(job, folder)
    write_whole(folder / "trained.json", json.dumps(outcome))


def _evaluate(recipe: Recipe, folder: Path, shared: Shared) -> dict[str, float]:
    known = score_models(recipe, shared.models, shared.questions)  # found
    model = Model(folder / "model", fingerprint(folder / "model"))
    records = score_model(recipe, model, shared.questions, known["original"])
    return evaluate_model(recipe, model, records, retain_reference(recipe, known.get("retain-only"))).values


class Run(tune.Trainable):
    """The actor: its thread runs a trial, its steps tell of the probes as they come."""

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        from components.models import quiet_libraries

        keep_private()
        quiet_libraries()
        sweep, number = Path(config["sweep"]), config["number"]
        self.look_at(sweep, number)
        self.thread = threading.Thread(target=_quietly_stopped, args=(sweep, number), name="trial", daemon=True)
        self.thread.start()

    def look_at(self, sweep: Path, number: int) -> None:
        """From now on the steps are those of this trial."""
        shared = read_shared(sweep)
        self.number, self.folder, self.space, self.told = number, trial_folder(sweep, number), shared.space, 0
        params = json.loads((self.folder / "trial.json").read_text(encoding="utf-8"))["params"]
        self.own = params == own_point(shared.space, shared.recipe.model_dump(mode="json"))

    def step(self) -> dict[str, Any]:
        """The next probe's result, or the trial's end."""
        while True:
            alive = self.thread.is_alive()
            lines = read_lines(self.folder / "metrics.jsonl")
            new = {step: compared for step, compared in reports(self.space, lines).items() if step > self.told}
            if new:
                self.told = min(new)
                compared = {} if self.own else {"compared": new[self.told]}  # what others are measured by stays
                return {"number": self.number, "step": self.told, **compared}
            if not alive:
                return {"number": self.number, "step": max(self.told, 1), "done": True}
            self.thread.join(_LOOK)

    def cleanup(self) -> None:
        """End the trial after its present step, in order: Ray Train's workers and their placement group go, too.

        However long that takes: two trials in one process would disturb each other.
        """
        while self.thread.is_alive():
            (self.folder / "stop").touch()
            self.thread.join(_LOOK)
        if (self.folder / "result.json").exists():
            clear(self.folder, read_shared(self.folder.parent).recipe)


def _quietly_stopped(sweep: Path, number: int) -> None:
    try:
        run_trial(sweep, number)
    except KeyboardInterrupt:  # Stopped: as asked by cleanup or the driver
        return
    finally:
        (trial_folder(sweep, number) / "stop").unlink(missing_ok=True)  # by which the driver knows
