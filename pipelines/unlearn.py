"""The main job: make the original model forget, and show what became of it.

    python pipelines/unlearn.py pipelines/recipes/demo.yaml [section.field=value ...] [--dry-run]

Makes the original and retain-only models where the recipe says how, prepares the three streams, trains, evaluates
before and after, writes model and report, logs to MLflow, registers the model as candidate and, where the recipe's
gates hold, as champion.
"""

import functools
import json
import shlex
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.config import Recipe, registered_name, run_name
from components.console import duration, utc
from components.errors import ConfigError
from components.evidence import WITHOUT_INTERVAL
from components.files import only_one, read_lines, write_whole, writing
from components.model_files import parameter_count
from components.models import load_tokenizer, tokenizer_facts
from components.tracking.follow import follow
from components.tracking.registry import candidates
from components.tracking.run import last_step, open_spool, put_lines, put_metrics, put_run, put_system, settings_of
from components.tracking.spool import Spool
from components.training.checkpoint_files import Place, remove_all
from components.training.launch import run_job
from components.urls import shown_url
from pipelines.before_after import evaluate_after, evaluate_before
from pipelines.cli import Command, leave, ray_session, run_cli, say, storage_folder, tracking_uri
from pipelines.environment import environment
from pipelines.evidence import PATIENCE, tell_unsent
from pipelines.finetune import (
    Model,
    check_cluster_for,
    check_context,
    check_inputs,
    check_plan,
    count_rows,
    inputs_digest,
    make_models,
    planned_parameters,
    planned_steps,
)
from pipelines.hand_over import candidate_text, hand_over, inputs, run_tags, source_tags
from pipelines.outcome import shown_summary, summary_texts
from pipelines.prepare import Streams, data_counts, names_in_tokenizer, notes, prepare_streams
from pipelines.run_folder import begin, check_begun, run_folder
from pipelines.training import (
    checkpoint_place,
    forget_cache,
    say_stopped,
    shown,
    telling,
    unlearning_job,
    with_references,
)

_TEXTS = ("prepared", "evaluations", "mlflow-artifacts", "mlflow.db")  # of a storage folder
_SHORT_PATIENCE = 3.0  # seconds that MLflow may fail to answer when the command failed already


def run(command: Command) -> None:
    """Run the recipe's main job, or show again what an earlier run of it gave."""
    recipe = command.recipe
    _check_gates(recipe)
    check_inputs(recipe)
    made_of = inputs_digest(recipe)
    folder = run_folder(recipe, made_of)
    finished = folder / "summary.json"
    if finished.exists():
        say(f"run          {folder.name} is finished already; set if_exists=new to run it again")
        say("\n" + shown_summary(json.loads(finished.read_text(encoding="utf-8"))))
        _send_late(recipe, folder)
        return
    started = time.perf_counter()
    with writing("Run", folder):
        folder.mkdir(parents=True, exist_ok=True)
    _tell_readable(folder.parent)
    with only_one(folder):
        with writing("Run", folder):
            begin(folder, recipe, made_of)
        say(f"run          {folder}")
        with ray_session(storage_folder(recipe)):
            check_cluster_for(recipe)
            summary = {**_unlearn(recipe, folder), "inputs": made_of}
        with writing("Run", folder):
            write_whole(finished, json.dumps(summary, indent=2, ensure_ascii=False))
            for name in ("begun.json", "trained.json", "stop"):  # for going on with it
                (folder / name).unlink(missing_ok=True)
    say("\n" + shown_summary(summary))
    tell_unsent(open_spool(folder, tracking_uri(recipe), telling("MLflow")), folder)
    say(f"\nall in {duration(time.perf_counter() - started)}")


def _tell_readable(storage: Path) -> None:
    """Say where other accounts can read what is stored, as earlier versions left it."""
    others = stat.S_IRWXG | stat.S_IRWXO
    if storage.stat().st_mode & others and any(
        place.stat().st_mode & others for name in _TEXTS if (place := storage / name).exists()
    ):
        say(f"storage      other accounts can read {storage}; close it: chmod -R go= {shlex.quote(str(storage))}")


def _check_gates(recipe: Recipe) -> None:
    if left_out := [g.metric for g in recipe.gates if not g.suite and not recipe.evaluation.wants(g.metric)]:
        raise ConfigError(
            f"Gates are on metrics that evaluation.metrics leaves out ({', '.join(left_out)}). Expected metrics "
            "that are computed. Name them there too, or drop the gates."
        )
    if certain := [g.metric for g in recipe.gates if g.confident and g.metric in WITHOUT_INTERVAL]:
        raise ConfigError(f"Gates cannot be confident: {', '.join(certain)} have no interval. Drop confident there.")


def _send_late(recipe: Recipe, folder: Path) -> None:
    """Send what MLflow has not got of a finished run: it did not answer then, or the recipe names another server."""
    spool = open_spool(folder, tracking_uri(recipe), telling("MLflow"))
    if count := spool.unsent():
        if not spool.drain(PATIENCE):
            say(f"MLflow       {count} entries sent: run {spool.known['run_id']}, {candidate_text(recipe, spool)}")
        tell_unsent(spool, folder)


def plan(command: Command) -> str:
    """Effective batch, steps, parameters and run folder, for --dry-run."""
    recipe, train = command.recipe, command.recipe.train
    _check_gates(recipe)
    check_plan(recipe)
    rows = {name: count_rows(getattr(recipe.data, name)) for name in ("forget", "normal", "random")}
    steps = planned_steps(train, rows["forget"])
    ranks = max(1, train.workers)
    accumulation = -(-train.batch_size // (ranks * train.micro_batch_size))
    parameters = planned_parameters(recipe)
    counts = {name: "unknown" if count is None else count for name, count in rows.items()}
    return "\n".join(
        [
            "\nPlan:",
            f"  rows        {', '.join(f'{name} {shown}' for name, shown in counts.items())}",
            f"  batch       {train.batch_size} forget rows a step = {ranks} worker(s) x up to "
            f"{train.micro_batch_size} rows x {accumulation} micro-batch(es)",
            f"  steps       {steps or 'unknown until the data is there'}",
            f"  parameters  {f'{parameters:,}' if parameters else 'unknown until the model is there'}",
            f"  run folder  {storage_folder(recipe) / run_name(recipe)}",
            f"  MLflow      {shown_url(tracking_uri(recipe))}",
        ]
    )


def _unlearn(recipe: Recipe, folder: Path) -> dict[str, Any]:
    storage = storage_folder(recipe)
    models = make_models(recipe)
    original = models["original"]
    check_context(recipe, original.folder)
    place = storage if recipe.data.cache else folder
    streams = _prepare(recipe, original, place)

    before = evaluate_before(recipe, models)
    spool = open_spool(folder, tracking_uri(recipe), telling("MLflow"))
    made_from = {"model": original.hash, **{name: prepared.digest for name, prepared in streams.sets().items()}}
    run_id = check_begun(folder, made_from)
    checkpoints = checkpoint_place(recipe.train, folder / "checkpoints", f"{folder.name}-{run_id}")
    with writing("Run", folder):
        write_whole(folder / "environment.json", json.dumps(environment(), indent=2))
    tags = run_tags(recipe, original.hash, {name: found.digest for name, found in streams.sets().items()})
    told = {**tags, **source_tags()}
    attempt = put_run(
        spool, recipe.tracking.experiment, storage, folder, settings_of(recipe), told, files=[folder / "config.json"],
        inputs=inputs(recipe, streams, before.questions),
    )  # fmt: skip
    if attempt > 1:
        say(f"attempt      {attempt}")
    spool.put("artifact", path=str(folder / "environment.json"))
    try:
        put_metrics(spool, "eval", before.evaluated["original"].values if before.evaluated else {}, step=0)
        put_metrics(spool, "rows", data_counts(streams), step=0)
        with spool.sending():
            trained = _train(recipe, folder, original, streams, spool, made_from, checkpoints)
            outcome, evidence = evaluate_after(recipe, folder, streams, before, trained)
            hand_over(spool, outcome, evidence, tags, trained)
        spool.put("end", status="FINISHED")
        spool.drain(PATIENCE)
    except BaseException as error:
        with suppress(Exception):  # what went wrong first is what must be told
            spool.put("end", status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            spool.drain(_SHORT_PATIENCE, limit=2 * _SHORT_PATIENCE)
        raise
    try:
        remove_all(Place(checkpoints))
    except OSError as error:  # the run is done; they only take room
        say(f"checkpoints  cannot be removed from {checkpoints}: {error}")
    if not recipe.data.cache:
        forget_cache(folder)
    known = spool.known
    link = (known["experiment_id"], known["run_id"]) if "experiment_id" in known else None
    return {
        "run": folder.name, "registered_model": candidates(registered_name(recipe)), "version": known.get("version"),
        "made_from": made_from, "metrics": outcome.metrics, "steps": trained["steps"], "seconds": trained["seconds"],
        "names_as_tokens": names_in_tokenizer(streams), "mlflow_run_id": known.get("run_id"),
        **summary_texts(outcome, candidate_text(recipe, spool), link),
    }  # fmt: skip


def _prepare(recipe: Recipe, original: Model, place: Path) -> Streams:
    streams = prepare_streams(recipe, tokenizer_facts(load_tokenizer(original.folder)), place)
    say("data         " + ", ".join(f"{name} {set_.good}" for name, set_ in streams.sets().items()) + " rows")
    for note in notes(streams):
        say(f"             {note}")
    return streams


def _train(
    recipe: Recipe, folder: Path, original: Model, streams: Streams, spool: Spool, made_from: dict[str, str],
    checkpoints: str,
) -> dict[str, Any]:  # fmt: skip
    """Train, or go on with it; what was trained already is not trained again."""
    trained = folder / "trained.json"
    if trained.exists():
        found = json.loads(trained.read_text(encoding="utf-8"))
        say(f"unlearning   done already, {found['steps']} steps")
        return found
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    for name in ("model", "model-adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    job = unlearning_job(recipe, folder, original.folder, streams.places(), made_from, checkpoints)
    place = storage_folder(recipe) if recipe.data.cache else folder
    job = with_references(job.model_copy(update={"system": str(folder / "system")}), original.hash, place, tell=True)
    where = f"{recipe.train.workers} Ray workers" if recipe.train.workers else "this process"
    say(f"unlearning   {parameter_count(original.folder):,} parameters, ZeRO-{recipe.train.zero_stage}, {where}")
    try:
        with follow(metrics, functools.partial(put_lines, spool), after=last_step(spool)), shown(job):
            outcome = run_job(job, folder)
    finally:
        put_system(spool, [line for file in sorted((folder / "system").glob("*.jsonl")) for line in read_lines(file)])
        shutil.rmtree(folder / "system", ignore_errors=True)
    outcome["at"] = utc()
    outcome["seconds"] = sum(line["perf/step_seconds"] for line in read_lines(metrics))  # over all attempts
    failures = sum(event["event"] == "failure" for event in read_lines(events))
    spool.put("tags", tags={"worker_failures": str(failures)})
    with writing("Run", folder):
        write_whole(trained, json.dumps(outcome, indent=2))
    say_stopped(outcome)
    return outcome


if __name__ == "__main__":
    leave(run_cli(__doc__, run, plan))
