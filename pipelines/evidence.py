"""Evidence of a recipe's own run: found again, kept in its folder, and sent to MLflow, by which promotion judges."""

from collections.abc import Mapping
from pathlib import Path

from components.config import Recipe
from components.data.prepare import Prepared
from components.evidence import Evaluated, Evidence, write_evidence
from components.files import writing
from components.tracking.gates import CANDIDATE
from components.tracking.run import open_spool
from components.tracking.spool import Spool
from pipelines.cli import Command, say, storage_folder, tracking_uri
from pipelines.finetune import Model
from pipelines.training import telling

PATIENCE = 20.0  # seconds that MLflow may fail to answer before a command ends without it


def own_run(command: Command) -> Path | None:
    """The folder of the recipe's newest finished run, if there is one."""
    storage = storage_folder(command.recipe)
    for name in command.runs:
        finished = [file.parent for file in storage.glob(f"{name}*/summary.json")]
        numbers = {folder: folder.name.removeprefix(name).removeprefix("-") or "1" for folder in finished}
        if known := [folder for folder, number in numbers.items() if number.isdigit()]:
            return max(known, key=lambda folder: int(numbers[folder]))
    return None


def evidence_of(
    models: Mapping[str, Model], evaluated: Mapping[str, Evaluated], questions: Mapping[str, Prepared], own: Path | None
) -> Evidence:
    """What was found of `models`, of which the one in the run folder `own` is the candidate."""

    def called(name: str) -> str:
        return CANDIDATE if own and models[name].folder == own / "model" else name

    return Evidence(
        {name: prepared.digest for name, prepared in questions.items()},
        {called(name): model.hash for name, model in models.items()},
        {called(name): found for name, found in evaluated.items()},
    )


def put_evidence(spool: Spool, folder: Path, evidence: Evidence, suite: str | None = None) -> None:
    """Write it into the run folder, and down for MLflow."""
    with writing("Evidence", folder):
        files = write_evidence(evidence, folder, suite)
    for file in files:
        spool.put("artifact", path=str(file))


def add_evidence(recipe: Recipe, folder: Path, evidence: Evidence, suite: str) -> None:
    """Add what a suite has found to a finished run."""
    spool = open_spool(folder, tracking_uri(recipe), telling("MLflow"))
    put_evidence(spool, folder, evidence, suite)
    spool.drain(PATIENCE)
    say(f"\nkept as evidence of {folder.name}; gates with suite: {suite} read it")
    tell_unsent(spool, folder)


def tell_unsent(spool: Spool, folder: Path) -> None:
    """Say what MLflow has not got, and how it gets it."""
    if left := spool.unsent():
        say(f"MLflow       {left} entries wait in {folder / 'mlflow'}; unlearn.py with the same recipe sends them")
    if refused := spool.refused():
        say(f"MLflow       refused {len(refused)} entries, with the reason in {folder / 'mlflow' / 'refused.jsonl'}")
