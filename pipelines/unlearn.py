"""The main job: make the original model forget, and show what became of it.

    python pipelines/unlearn.py pipelines/recipes/demo.yaml [section.field=value ...] [--dry-run]

Makes the original and retain-only models where the recipe says how, prepares the three streams, trains, evaluates
before and after, writes model and report, logs to MLflow, registers the model as candidate and, where the recipe's
gates hold, as champion.
"""

import json
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.config import Recipe, config_hash, registered_name, run_name
from components.console import duration
from components.data.prepare import Prepared
from components.errors import ConfigError
from components.evaluation.metrics import evaluate_records
from components.evaluation.report import Sample, first_samples
from components.files import write_whole
from components.models import fingerprint, load_tokenizer, parameter_count, tokenizer_facts
from components.tracking import registry
from components.tracking.follow import follow
from components.tracking.gates import judge
from components.tracking.run import log_lines, log_metrics, make_client, open_run, tracking_uri
from components.training.job import Job
from components.training.launch import run_job
from components.training.reference import needs, reference_pass
from pipelines.cli import Command, Progress, ray_session, run_cli, say, storage_folder
from pipelines.evaluate import check_same_tokens, prepare_questions, score_model
from pipelines.finetune import (
    Model,
    check_cluster_for,
    check_context,
    check_inputs,
    count_rows,
    inputs_digest,
    make_models,
    planned_parameters,
    planned_steps,
    telling,
)
from pipelines.outcome import Outcome, summary_text, write_files
from pipelines.prepare import Streams, data_counts, notes, prepare_streams


def run(command: Command) -> None:
    """Run the recipe's main job, or show again what an earlier run of it gave."""
    recipe = command.recipe
    check_inputs(recipe)
    inputs = inputs_digest(recipe)
    folder = run_folder(recipe, inputs)
    finished = folder / "summary.json"
    if finished.exists():
        say(f"run          {folder.name} is finished already; set if_exists=new to run it again")
        say("\n" + json.loads(finished.read_text())["text"])
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(recipe.model_dump_json(indent=2))
    say(f"run          {folder}")
    started = time.perf_counter()
    with ray_session():
        check_cluster_for(recipe)
        summary = {**_unlearn(recipe, folder), "inputs": inputs}
    write_whole(finished, json.dumps(summary, indent=2, ensure_ascii=False))
    say("\n" + summary["text"])
    say(f"\nall in {duration(time.perf_counter() - started)}")


def plan(command: Command) -> str:
    """Effective batch, steps, parameters and run folder, for --dry-run."""
    recipe, train = command.recipe, command.recipe.train
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
            f"  MLflow      {tracking_uri(recipe.tracking, storage_folder(recipe))}",
        ]
    )


def run_folder(recipe: Recipe, inputs: str) -> Path:
    """Where this recipe's run lives: the first of `<run name>`, `<run name>-2`, … that it may use.

    A finished run counts as the same one when its input files and models were the same too; with `if_exists: new` it
    never does.

    Raises:
        ConfigError: with `if_exists: fail`, when the run exists.
    """
    name, number = run_name(recipe), 1
    while True:
        folder = storage_folder(recipe) / (name if number == 1 else f"{name}-{number}")
        summary = folder / "summary.json"
        same = summary.exists() and json.loads(summary.read_text())["inputs"] == inputs
        if same and recipe.if_exists == "fail":
            raise ConfigError(f"Run exists (folder={folder}). Set if_exists=resume to see it or new to run it anew.")
        if not summary.exists() or (same and recipe.if_exists == "resume"):
            return folder
        number += 1


def _unlearn(recipe: Recipe, folder: Path) -> dict[str, Any]:
    storage = storage_folder(recipe)
    original, retain_only = make_models(recipe)
    check_context(recipe, original.folder)
    place = storage if recipe.data.cache else folder
    streams = _prepare(recipe, original, place)

    questions = prepare_questions(recipe, original)
    records = {"original": score_model(recipe, original, questions)} if questions else {}
    if questions and retain_only:
        check_same_tokens([original, retain_only])
        records["retain-only"] = score_model(recipe, retain_only, questions)
    reference = records.get("retain-only")
    before = {name: evaluate_records(table, reference, recipe.evaluation) for name, table in records.items()}
    if before:
        say("baseline     " + ", ".join(_headline(name, metrics) for name, metrics in before.items()))

    uri = tracking_uri(recipe.tracking, storage)
    client = make_client(uri)
    tags = {
        "objective": "+".join(term.type for term in recipe.objective.terms().values()),
        "optimizer": recipe.optimizer.type,
        "recipe": recipe.name,
        "config_hash": config_hash(recipe),
        "original_model": original.hash,
        **{f"data.{name}": prepared.digest for name, prepared in streams.sets().items()},
    }
    run_id = open_run(client, recipe, folder.name, folder, tags)
    try:
        summary = _train_and_judge(recipe, folder, original, streams, questions, records, before, client, run_id, tags)
        client.set_terminated(run_id, "FINISHED")
        if not recipe.data.cache:
            for name in ("prepared", "reference", "overlap", "fingerprints"):
                shutil.rmtree(folder / name, ignore_errors=True)
    except BaseException:
        with suppress(Exception):  # what went wrong first is what must be told
            client.set_terminated(run_id, "FAILED")
        raise
    return summary


def _train_and_judge(
    recipe: Recipe, folder: Path, original: Model, streams: Streams, questions: dict[str, Prepared],
    records: dict[str, pa.Table], before: dict[str, dict[str, float]], client: Any, run_id: str, tags: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    log_metrics(client, run_id, "data", data_counts(streams), step=0)
    log_metrics(client, run_id, "eval", before.get("original", {}), step=0)
    trained = _train(recipe, folder, original, streams, client, run_id)
    model = Model(folder / "model", fingerprint(folder / "model"))

    samples: dict[str, list[Sample]] = {}
    metrics = dict(before)
    if questions:
        after = score_model(recipe, model, questions)
        metrics["unlearned"] = evaluate_records(after, records.get("retain-only"), recipe.evaluation)
        samples = {name: first_samples(records["original"], after, name) for name in questions}
    unlearned = metrics.get("unlearned", {})
    outcome = Outcome(
        recipe=recipe,
        folder=folder,
        metrics={name: metrics[name] for name in ("original", "unlearned", "retain-only") if name in metrics},
        samples=samples,
        gates=judge(recipe.gates, unlearned, metrics.get("original", {})),
        facts={
            "command": shlex.join(["python", *sys.argv]),
            "recipe": f"{recipe.name}, config hash {config_hash(recipe)}, seed {recipe.seed}",
            "original model": f"{original.folder.name}, fingerprint {original.hash}",
            "data": "; ".join(f"{n} {p.good} rows, digest {p.digest}" for n, p in streams.sets().items()),
            "set aside": "; ".join(notes(streams)) or "none",
            "training": f"{trained['steps']} steps in {duration(trained['seconds'])} on {trained['world']} worker(s)",
            "MLflow run": run_id,
        },
    )
    write_files(outcome)  # before anything that needs MLflow
    log_metrics(client, run_id, "eval", unlearned, step=trained["steps"])
    log_metrics(client, run_id, "retain_only", metrics.get("retain-only", {}), step=0)
    client.log_artifact(run_id, str(folder / "report.html"))
    name = registered_name(recipe)
    version = registry.register(client, run_id, model.folder, name, unlearned, trained["steps"], tags)
    if outcome.champion:
        registry.set_champion(client, name, version)
    return {
        "run": folder.name, "mlflow_run_id": run_id, "registered_model": name, "version": version,
        "champion": outcome.champion, "metrics": outcome.metrics, "steps": trained["steps"],
        "seconds": trained["seconds"], "text": summary_text(outcome, f"{name} version {version}"),
    }  # fmt: skip


def _prepare(recipe: Recipe, original: Model, place: Path) -> Streams:
    streams = prepare_streams(recipe, tokenizer_facts(load_tokenizer(original.folder)), place)
    say("data         " + ", ".join(f"{name} {set_.good}" for name, set_ in streams.sets().items()) + " rows")
    for note in notes(streams):
        say(f"             {note}")
    return streams


def _train(recipe: Recipe, folder: Path, original: Model, streams: Streams, client: Any, run_id: str) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    checkpoints = folder / "checkpoints"
    if not recipe.train.checkpoint_every:
        shutil.rmtree(checkpoints, ignore_errors=True)
    done = 0
    if start := _newest_checkpoint(checkpoints):
        done = int(start.name.removeprefix("step-"))
        say(f"going on     after step {done}, from {start}")
    else:
        metrics.unlink(missing_ok=True)  # of a run that did not reach its end
    for name in ("model", "model-adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    job = Job(
        model=str(original.folder),
        output=str(folder / "model"),
        checkpoints=str(checkpoints) if recipe.train.checkpoint_every else None,
        metrics=str(metrics),
        **{name: str(prepared.folder) for name, prepared in streams.sets().items()},
        normal_without=str(streams.without) if streams.without else None,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        train=recipe.train,
        mask=recipe.mask,
        responses_by_row=recipe.data.responses == "by_row",
        seed=recipe.seed,
    )
    place = storage_folder(recipe) if recipe.data.cache else folder
    references = {
        group: str(reference_pass(job, group, what, original.hash, place, telling(f"original on {group}")))
        for group, what in needs(recipe.objective).items()
    }
    job = job.model_copy(update={"reference": references})
    where = f"{recipe.train.workers} Ray workers" if recipe.train.workers else "this process"
    say(f"unlearning   {parameter_count(original.folder):,} parameters, ZeRO-{recipe.train.zero_stage}, {where}")
    with (
        follow(metrics, Progress(recipe.train.log_every), after=done),
        follow(metrics, lambda lines: log_lines(client, run_id, lines), interval=2.0) as unsent,
    ):
        outcome = run_job(job, folder, say)
    if unsent:
        say(f"MLflow       metrics were not all sent: {unsent[0]}. They are whole in {metrics}")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return outcome


def _newest_checkpoint(folder: Path) -> Path | None:
    from components.training.checkpoint import newest  # imports torch

    return newest(folder)


def _headline(name: str, metrics: dict[str, float]) -> str:
    shown = [key for key in ("forget_probability", "model_utility") if key in metrics]
    return f"{name}: " + " ".join(f"{key} {metrics[key]:.3f}" for key in shown)


if __name__ == "__main__":
    sys.exit(run_cli(__doc__, run, plan))
