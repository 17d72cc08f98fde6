"""Make the candidate of a recipe champion, if the recipe's gates hold for it.

    python pipelines/promote.py pipelines/recipes/demo.yaml [section.field=value ...] [--dry-run]

Judges the evaluation stored with the candidate's run by the gates of the recipe as it stands now. Exit code 1 when a
gate does not hold.
"""

import json
import sys
from pathlib import Path

from components.config import registered_name
from components.errors import ConfigError, TrackingError
from components.tracking import registry
from components.tracking.gates import gate_table, judge
from components.tracking.run import make_client, tracking_uri
from pipelines.cli import Command, run_cli, say, storage_folder


def run(command: Command) -> None:
    """Judge the candidate and move the alias `champion`."""
    recipe = command.recipe
    if not recipe.gates:
        raise ConfigError("Nothing to judge by: gates is empty. Give at least one gate.")
    name = registered_name(recipe)
    client = make_client(tracking_uri(recipe.tracking, storage_folder(recipe)))
    version = registry.candidate(client, name)
    folder = Path(client.get_run(version.run_id).data.tags["run_folder"])
    metrics = {model: _metrics(folder / "eval" / f"{model}.json") for model in ("unlearned", "original")}
    results = judge(recipe.gates, metrics["unlearned"], metrics["original"])
    say(f"{name} version {version.version}, run {folder.name}\n\n{gate_table(results)}\n")
    if not all(result.passed for result in results):
        raise TrackingError(
            f"Candidate is not promoted (model={name}, version={version.version}). Expected every gate to hold. "
            "Unlearn again with other settings, or change the gates."
        )
    registry.set_champion(client, name, version.version)
    say(f"champion: {name} version {version.version}")


def plan(command: Command) -> str:
    """Which gates would be judged, for --dry-run."""
    gates = ", ".join(gate.metric for gate in command.recipe.gates) or "none"
    return f"\nPlan: judge candidate of {registered_name(command.recipe)} by gates: {gates}"


def _metrics(file: Path) -> dict[str, float]:
    if not file.exists():
        raise TrackingError(f"Evaluation of the candidate is gone (file={file}). Expected it in its run folder.")
    return json.loads(file.read_text())


if __name__ == "__main__":
    sys.exit(run_cli(__doc__, run, plan))
