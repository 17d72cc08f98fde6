"""The models before and after: asked the same questions, judged by the gates that can be judged now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from components.config import Recipe, config_hash
from components.console import duration
from components.data.prepare import Prepared
from components.data.requests import RequestFile, read_requests
from components.data.rows import PreparedRows
from components.errors import ModelError
from components.evaluation.by_request import by_request
from components.evaluation.report import Sample, telling_samples
from components.evidence import Evaluated, Evidence
from components.files import read_lines, write_whole
from components.models import fingerprint
from components.tracking.gates import CANDIDATE, is_of_run, judge
from pipelines.cli import say
from pipelines.environment import command, versions
from pipelines.evaluate import (
    check_same_tokens,
    evaluate_model,
    evaluate_models,
    headline,
    prepare_questions,
    retain_reference,
    score_model,
    score_models,
)
from pipelines.evidence import evidence_of
from pipelines.finetune import Model
from pipelines.outcome import Outcome, empty_answers
from pipelines.prepare import Streams, notes, set_aside

_SHOWN = ("forget_probability", "model_utility")
_MODELS = ("original", CANDIDATE, "retain-only")


class Before(NamedTuple):
    """What is known of the models before training."""

    models: dict[str, Model]
    """Original and, where there is one, retain-only."""
    requests: RequestFile | None
    """The deletion requests as they were read before training."""
    questions: dict[str, Prepared]
    """By question set."""
    records: dict[str, pa.Table]
    """By model: original and retain-only, as far as there are any."""
    evaluated: dict[str, Evaluated]
    """By model."""


def evaluate_before(recipe: Recipe, models: dict[str, Model]) -> Before:
    """Score the original and the retain-only model (`make_models`) on the recipe's questions."""
    questions = prepare_questions(recipe, models["original"])
    asked = models if questions else {}
    check_same_tokens(list(asked.values()))
    records = score_models(recipe, asked, questions)
    evaluated = evaluate_models(recipe, models, records)
    if evaluated:
        say("baseline     " + ", ".join(headline(name, found.values, _SHOWN) for name, found in evaluated.items()))
    requests = read_requests(recipe.data.requests) if recipe.data.requests else None
    return Before(models, requests, questions, records, evaluated)


def evaluate_after(
    recipe: Recipe, folder: Path, streams: Streams, before: Before, trained: Mapping[str, Any]
) -> tuple[Outcome, Evidence]:
    """Evaluate what was trained; (everything for reports, what promotion will judge by)."""
    model, original = Model(folder / "model", fingerprint(folder / "model")), before.models["original"]
    samples: dict[str, list[Sample]] = {}
    records, evaluated = dict(before.records), dict(before.evaluated)
    problems = []
    if since := trained.get("collapsed_since"):
        problems.append(f"collapsed: from step {since} on worse on the normal rows than guessing")
    if before.questions:
        try:
            after = records[CANDIDATE] = score_model(recipe, model, before.questions, records["original"])
            reference = retain_reference(recipe, before.records.get("retain-only"))
            evaluated[CANDIDATE] = evaluate_model(recipe, model, after, reference)
            samples = {name: telling_samples(records["original"], after, name) for name in before.questions}
        except ModelError as error:  # the training is done, and whoever waited for it gets a report all the same
            problems.append(f"cannot be evaluated: {error}")
    models = {**before.models, CANDIDATE: model}
    evidence = evidence_of(models, evaluated, before.questions, None)
    now = [gate for gate in recipe.gates if is_of_run(gate)]
    happened = [event["text"] for event in read_lines(folder / "events.jsonl")]
    outcome = Outcome(
        recipe=recipe,
        folder=folder,
        evaluated={name: evaluated[name] for name in _MODELS if name in evaluated},
        records={name: records[name] for name in _MODELS if name in records},
        samples=samples,
        problems=problems,
        gates=judge(now, {None: evidence} if evaluated else {}, model.hash),
        facts={
            "command": command(),
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
    if before.requests and streams.forget:
        _write_requests(before.requests, folder, models, streams.forget, before.questions.get("forget"), records)
    return outcome, evidence


def _write_requests(
    requests: RequestFile, folder: Path, models: Mapping[str, Model], forget: Prepared, asked: Prepared | None,
    records: Mapping[str, pa.Table],
) -> None:  # fmt: skip
    """What became of each deletion request, for the certificate of whoever promotes the model."""
    questions = PreparedRows(asked.folder).table() if asked else None
    about = {
        "file": requests.sha256,
        "models": {name: model.hash for name, model in models.items()},
        "requests": by_request(requests.requests, PreparedRows(forget.folder).table(), questions, records),
    }
    write_whole(folder / "requests.json", json.dumps(about, indent=2, ensure_ascii=False))
