"""What MLflow is told of a run: what it is made from, what came of it, and its model as a candidate."""

import getpass
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config import PoolSource, Recipe, config_hash, objective_name, registered_name
from components.data.prepare import Prepared
from components.data.sources import source_files
from components.evidence import Evidence
from components.files import writing
from components.tracking.gates import CANDIDATE
from components.tracking.registry import candidates
from components.tracking.run import Input, put_metrics
from components.tracking.spool import Spool
from pipelines.environment import code_commit, command
from pipelines.evidence import put_evidence
from pipelines.outcome import Outcome, description, write_files
from pipelines.prepare import Streams


def run_tags(
    recipe: Recipe, original_hash: str, digests: Mapping[str, str], *, stage: str = "unlearn"
) -> dict[str, str]:
    """What runs and model versions are found by; `digests` of the rows, by set."""
    return {
        "stage": stage,
        "objective": objective_name(recipe),
        "optimizer": recipe.optimizer.type,
        "recipe": recipe.name,
        "config_hash": config_hash(recipe),
        "original_model": original_hash,
        **{f"data.{name}": digest for name, digest in digests.items()},
    }


def source_tags() -> dict[str, str]:
    """Who ran what, where MLflow looks for it."""
    commit = code_commit()
    return {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.type": "JOB",
        "mlflow.source.name": command(),
        **({"mlflow.source.git.commit": commit} if commit else {}),
    }


def inputs(recipe: Recipe, streams: Streams, questions: Mapping[str, Prepared]) -> list[Input]:
    """The data sets that a run is made from and measured on."""
    trained: dict[str, Sequence[PoolSource]] = {
        "forget": recipe.data.forget, "normal": recipe.data.normal, "random": recipe.data.random
    }  # fmt: skip
    found = [(name, prepared, trained[name]) for name, prepared in streams.sets().items()]
    found += [(f"{name} questions", asked, recipe.evaluation.sets[name].rows) for name, asked in questions.items()]
    return [
        Input(name, prepared.digest, prepared.good, [file for source in sources for file in source_files(source)])
        for name, prepared, sources in found
    ]


def hand_over(
    spool: Spool, outcome: Outcome, evidence: Evidence, tags: Mapping[str, str], trained: Mapping[str, Any]
) -> None:
    """Write report and evidence, and have them and the model registered."""
    folder = outcome.folder
    with writing("Report", folder):
        write_files(outcome)
    put_metrics(spool, "retain_only", outcome.metrics.get("retain-only", {}), step=0)
    for name in ("report.html", "events.jsonl", "requests.json", "figures", "eval"):
        if (folder / name).exists():
            spool.put("artifact", path=str(folder / name), into=name if (folder / name).is_dir() else None)
    told = description(outcome)
    tables = [{"path": "eval/metrics_table.json", "type": "table"}] if outcome.metrics else []
    spool.put("tags", tags={"mlflow.note.content": told, "mlflow.loggedArtifacts": json.dumps(tables)})
    put_candidate(
        spool, outcome.recipe, folder, evidence, tags, steps=trained["steps"], trained_at=trained["at"],
        description=told,
    )  # fmt: skip


def put_candidate(
    spool: Spool, recipe: Recipe, folder: Path, evidence: Evidence, tags: Mapping[str, str], *, steps: int,
    trained_at: str, description: str,
) -> None:  # fmt: skip
    """Put down the evidence and the model in `folder`, which becomes a candidate with its metrics."""
    put_evidence(spool, folder, evidence)
    found = evidence.evaluated.get(CANDIDATE)
    metrics = found.values if found else {}
    shown = {f"eval.{name}": f"{value:.6g}" for name, value in metrics.items()}
    spool.put(
        "model", folder=str(folder / "model"), name=registered_name(recipe), step=steps,
        tags={**tags, **shown, "fingerprint": evidence.models[CANDIDATE]}, description=description,
        trained_at=trained_at,
    )  # fmt: skip
    put_metrics(spool, "eval", metrics, step=steps, of_model=True)


def candidate_text(recipe: Recipe, spool: Spool) -> str:
    """The model's name in the registry, with the version where it was sent."""
    number = spool.known.get("version")
    return f"{candidates(registered_name(recipe))} {f'version {number}' if number else '(not sent)'}"
