"""Which folder a command's run lives in, and what it was begun with."""

import json
import uuid
from pathlib import Path

from components.config import Recipe, differences, run_name
from components.errors import ConfigError
from components.files import write_whole
from pipelines.cli import storage_folder


def run_folder(recipe: Recipe, inputs: str) -> Path:
    """Where this recipe's run lives: the first of `<run name>`, `<run name>-2`, … that it may use.

    A finished run counts as the same one when its input files and models were the same too; with `if_exists: new` it
    never does. An unfinished one is gone on with; with `if_exists: new` only where that was what began it.

    Raises:
        ConfigError: with `if_exists: fail`, when the run exists.
    """
    name, number = run_name(recipe), 1
    while True:
        folder = storage_folder(recipe) / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
        finished = (folder / "summary.json").exists()
        file = folder / ("summary.json" if finished else "begun.json")
        about = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        same = about.get("inputs", inputs) == inputs
        if finished and same and recipe.if_exists == "fail":
            raise ConfigError(f"Run exists (folder={folder}). Set if_exists=resume to see it or new to run it anew.")
        if finished and same and recipe.if_exists == "resume":
            return folder
        if not finished and (recipe.if_exists != "new" or (same and about.get("if_exists", "new") == "new")):
            return folder  # to be gone on with
        number += 1


def begin(folder: Path, recipe: Recipe, inputs: str) -> None:
    """Write down what the run is of; what an earlier attempt wrote stays."""
    write_whole(folder / "config.json", recipe.model_dump_json(indent=2))
    if not (folder / "begun.json").exists():
        about = {"inputs": inputs, "if_exists": recipe.if_exists, "id": uuid.uuid4().hex[:8]}
        write_whole(folder / "begun.json", json.dumps(about))


def check_begun(folder: Path, made_from: dict[str, str]) -> str:
    """Refuse to go on with what was begun with other models or rows. Returns the id of the run.

    Raises:
        ConfigError: naming what was and what is.
    """
    begun = json.loads((folder / "begun.json").read_text(encoding="utf-8"))
    if changed := differences(begun.setdefault("made_from", made_from), made_from):
        raise ConfigError(
            f"Run was begun with other models or rows (folder={folder}; {'; '.join(changed)}). Expected the same. Put "
            "back what was changed, set if_exists=new to start anew beside it, or remove the folder."
        )
    write_whole(folder / "begun.json", json.dumps(begun))
    return begun["id"]
