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
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from components.config import Recipe, config_hash, registered_name, run_name
from components.console import duration
from components.data.prepare import Prepared
from components.errors import ConfigError
from components.evaluation.evaluate import Evaluated, Reference
from components.evaluation.report import Sample, telling_samples
from components.files import only_one, read_lines, write_whole, writing
from components.models import fingerprint, load_tokenizer, parameter_count, tokenizer_facts
from components.tracking.follow import follow
from components.tracking.gates import judge
from components.tracking.run import last_step, open_spool, put_lines, put_metrics, put_run, tracking_uri
from components.tracking.spool import Spool
from components.training.checkpoint_files import Place, remove_all
from components.training.job import Job
from components.training.launch import run_job
from components.training.reference import needs, reference_pass
from pipelines.cli import Command, ray_session, run_cli, say, storage_folder
from pipelines.evaluate import (
    check_same_tokens,
    evaluate_model,
    prepare_questions,
    retain_reference,
    score_model,
    score_models,
)
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
)
from pipelines.outcome import Outcome, empty_answers, summary_text, versions, write_files
from pipelines.prepare import Streams, data_counts, notes, prepare_streams, set_aside
from pipelines.run_folder import begin, check_begun, run_folder
from pipelines.training import checkpoint_place, say_stopped, shown, telling

_MODELS = ("original", "unlearned", "retain-only")
_PATIENCE, _SHORT_PATIENCE = 20.0, 3.0  # seconds that MLflow may fail to answer before the command ends without it


class Before(NamedTuple):
    """What is known of the models before training."""

    questions: dict[str, Prepared]
    """By question set."""
    records: dict[str, pa.Table]
    """By model: original and retain-only, as far as there are any."""
    reference: Reference | None
    """Of the retain-only model."""
    evaluated: dict[str, Evaluated]
    """By model."""


def run(command: Command) -> None:
    """Run the recipe's main job, or show again what an earlier run of it gave."""
    recipe = command.recipe
    _check_gates(recipe)
    check_inputs(recipe)
    inputs = inputs_digest(recipe)
    folder = run_folder(recipe, inputs)
    finished = folder / "summary.json"
    if finished.exists():
        say(f"run          {folder.name} is finished already; set if_exists=new to run it again")
        say("\n" + json.loads(finished.read_text())["text"])
        _send_late(recipe, folder)
        return
    started = time.perf_counter()
    with writing("Run", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        with writing("Run", folder):
            begin(folder, recipe, inputs)
        say(f"run          {folder}")
        with ray_session():
            check_cluster_for(recipe)
            summary = {**_unlearn(recipe, folder), "inputs": inputs}
        with writing("Run", folder):
            write_whole(finished, json.dumps(summary, indent=2, ensure_ascii=False))
            for name in ("begun.json", "trained.json", "stop"):  # for going on with it
                (folder / name).unlink(missing_ok=True)
    say("\n" + summary["text"])
    _tell_unsent(recipe, folder)
    say(f"\nall in {duration(time.perf_counter() - started)}")


def _check_gates(recipe: Recipe) -> None:
    if left_out := [gate.metric for gate in recipe.gates if not recipe.evaluation.wants(gate.metric)]:
        raise ConfigError(
            f"Gates are on metrics that evaluation.metrics leaves out ({', '.join(left_out)}). Expected metrics "
            "that are computed. Name them there too, or drop the gates."
        )


def _send_late(recipe: Recipe, folder: Path) -> None:
    """Send what MLflow has not got of a finished run: it did not answer then, or the recipe names another server."""
    spool = open_spool(folder, recipe.tracking, storage_folder(recipe), telling("MLflow"))
    if count := spool.unsent():
        if not spool.drain(_PATIENCE):
            name, version = registered_name(recipe), spool.known.get("version")
            say(f"MLflow       {count} entries sent: run {spool.known['run_id']}, {name} version {version}")
        _tell_unsent(recipe, folder)


def _tell_unsent(recipe: Recipe, folder: Path) -> None:
    """Say what MLflow has not got, and how it gets it."""
    spool = open_spool(folder, recipe.tracking, storage_folder(recipe), telling("MLflow"))
    if left := spool.unsent():
        say(f"MLflow       {left} entries wait in {folder / 'mlflow'}; the same command sends them")
    if refused := spool.refused():
        say(f"MLflow       refused {len(refused)} entries, with the reason in {folder / 'mlflow' / 'refused.jsonl'}")


def plan(command: Command) -> str:
    """Effective batch, steps, parameters and run folder, for --dry-run."""
    recipe, train = command.recipe, command.recipe.train
    _check_gates(recipe)
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


def _unlearn(recipe: Recipe, folder: Path) -> dict[str, Any]:
    storage = storage_folder(recipe)
    original, retain_only = make_models(recipe)
    check_context(recipe, original.folder)
    place = storage if recipe.data.cache else folder
    streams = _prepare(recipe, original, place)

    before = _evaluate_before(recipe, original, retain_only)
    spool = open_spool(folder, recipe.tracking, storage, telling("MLflow"))
    made_from = {"model": original.hash, **{name: prepared.digest for name, prepared in streams.sets().items()}}
    run_id = check_begun(folder, made_from)
    checkpoints = checkpoint_place(recipe.train, folder / "checkpoints", f"{folder.name}-{run_id}")
    if (attempt := put_run(spool, recipe, folder.name, folder, run_tags(recipe, original, streams))) > 1:
        say(f"attempt      {attempt}")
    try:
        put_metrics(spool, "data", data_counts(streams), step=0)
        put_metrics(spool, "eval", before.evaluated["original"].values if before.evaluated else {}, step=0)
        with spool.sending():
            trained = _train(recipe, folder, original, streams, spool, made_from, checkpoints)
            outcome = _judge(recipe, folder, original, streams, before, spool, trained)
        spool.put("end", status="FINISHED")
        spool.drain(_PATIENCE)
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
        for name in ("prepared", "reference", "overlap", "fingerprints"):
            shutil.rmtree(folder / name, ignore_errors=True)
    version = spool.known.get("version")
    return {
        "run": folder.name, "registered_model": registered_name(recipe), "champion": outcome.champion,
        "metrics": outcome.metrics, "steps": trained["steps"], "seconds": trained["seconds"],
        "mlflow_run_id": spool.known.get("run_id"), "version": version,
        "text": summary_text(outcome, f"{registered_name(recipe)} {f'version {version}' if version else '(not sent)'}"),
    }  # fmt: skip


def run_tags(recipe: Recipe, original: Model, streams: Streams) -> dict[str, str]:
    """What runs and model versions are found by."""
    return {
        "objective": "+".join(term.type for term in recipe.objective.terms().values()),
        "optimizer": recipe.optimizer.type,
        "recipe": recipe.name,
        "config_hash": config_hash(recipe),
        "original_model": original.hash,
        **{f"data.{name}": prepared.digest for name, prepared in streams.sets().items()},
    }


def _evaluate_before(recipe: Recipe, original: Model, retain_only: Model | None) -> Before:
    """Score the original and the retain-only model on the recipe's questions."""
    questions = prepare_questions(recipe, original)
    models = {"original": original, **({"retain-only": retain_only} if retain_only else {})} if questions else {}
    check_same_tokens(list(models.values()))
    records = score_models(recipe, models, questions)
    reference = retain_reference(recipe, records.get("retain-only"))
    evaluated = {name: evaluate_model(recipe, models[name], table, reference) for name, table in records.items()}
    if evaluated:
        say("baseline     " + ", ".join(_headline(name, found.values) for name, found in evaluated.items()))
    return Before(questions, records, reference, evaluated)


def _judge(
    recipe: Recipe, folder: Path, original: Model, streams: Streams, before: Before, spool: Spool,
    trained: dict[str, Any],
) -> Outcome:  # fmt: skip
    """Evaluate what was trained, write the report, and have it registered."""
    model = Model(folder / "model", fingerprint(folder / "model"))

    samples: dict[str, list[Sample]] = {}
    records, evaluated = dict(before.records), dict(before.evaluated)
    if before.questions:
        after = records["unlearned"] = score_model(recipe, model, before.questions, records["original"])
        evaluated["unlearned"] = evaluate_model(recipe, model, after, before.reference)
        samples = {name: telling_samples(records["original"], after, name) for name in before.questions}
    values = {name: found.values for name, found in evaluated.items()}
    unlearned = values.get("unlearned", {})
    happened = [event["text"] for event in read_lines(folder / "events.jsonl")]
    outcome = Outcome(
        recipe=recipe,
        folder=folder,
        evaluated={name: evaluated[name] for name in _MODELS if name in evaluated},
        records={name: records[name] for name in _MODELS if name in records},
        samples=samples,
        gates=judge(recipe.gates, unlearned, values.get("original", {})),
        facts={
            "command": shlex.join(["python", *sys.argv]),
            "recipe": f"{recipe.name}, config hash {config_hash(recipe)}, seed {recipe.seed}",
            "original model": f"{original.folder.name}, fingerprint {original.hash}",
            "data": "; ".join(f"{n} {p.good} rows, digest {p.digest}" for n, p in streams.sets().items()),
            "set aside": "; ".join([*notes(streams), *set_aside(before.questions)]) or "none",
            "training": f"{trained['steps']} steps in {duration(trained['seconds'])} on {trained['world']} worker(s)",
            "interruptions": "; ".join(happened) or "none",
            "empty answers": empty_answers(records),
            "versions": versions(),
        },
    )
    with writing("Report", folder):
        write_files(outcome)
    put_metrics(spool, "eval", unlearned, step=trained["steps"])
    put_metrics(spool, "retain_only", values.get("retain-only", {}), step=0)
    for file in ("report.html", "metrics.json", "events.jsonl"):
        if (folder / file).exists():
            spool.put("artifact", path=str(folder / file))
    spool.put(
        "model", folder=str(model.folder), name=registered_name(recipe), metrics=unlearned, step=trained["steps"],
        tags=run_tags(recipe, original, streams), champion=outcome.champion,
    )  # fmt: skip
    return outcome


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
        found = json.loads(trained.read_text())
        say(f"unlearning   done already, {found['steps']} steps")
        return found
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    for name in ("model", "model-adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    job = Job(
        model=str(original.folder),
        output=str(folder / "model"),
        metrics=str(metrics),
        events=str(events),
        stop=str(folder / "stop"),
        checkpoints=checkpoints,
        made_from=made_from,
        **{name: str(prepared.folder) for name, prepared in streams.sets().items()},
        normal_without=str(streams.without) if streams.without else None,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        train=recipe.train,
        mask=recipe.mask,
        guards=recipe.guards,
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
    with follow(metrics, functools.partial(put_lines, spool), after=last_step(spool)), shown(job):
        outcome = run_job(job, folder)
    outcome["seconds"] = sum(line["perf/step_seconds"] for line in read_lines(metrics))  # over all attempts
    failures = sum(event["event"] == "failure" for event in read_lines(events))
    spool.put("tags", tags={"worker_failures": str(failures)})
    with writing("Run", folder):
        write_whole(trained, json.dumps(outcome, indent=2))
    say_stopped(outcome)
    return outcome


def _headline(name: str, metrics: dict[str, float]) -> str:
    shown = [key for key in ("forget_probability", "model_utility") if key in metrics]
    return f"{name}: " + " ".join(f"{key} {metrics[key]:.3f}" for key in shown)


if __name__ == "__main__":
    sys.exit(run_cli(__doc__, run, plan))
