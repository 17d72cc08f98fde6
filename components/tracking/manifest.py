"""What a model folder consists of: each file with its size and sha256, and nothing that could run code."""

import hashlib
import json
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.files import sha256

NAME = "MANIFEST.json"
_ALLOWED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")


def manifest_of(folder: Path) -> str:
    """The folder's files as JSON, the same text for the same bytes.

    Raises:
        TrackingError: when a file is of a kind that a model needs not have, such as a pickle or code.
    """
    files = {}
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        if file.suffix not in _ALLOWED:
            raise TrackingError(
                f"Model folder holds a file that is none of a model's (path={file}). Expected only "
                f"{', '.join(_ALLOWED)}: weights in safetensors, settings and texts. Remove it."
            )
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return json.dumps(files, indent=1, sort_keys=True)


def manifest_digest(manifest: str) -> str:
    """The sha256 that stands for the whole folder."""
    return hashlib.sha256(manifest.encode()).hexdigest()


def check_folder(folder: Path, manifest: str, digest: str, model: str) -> None:
    """Refuse a folder that is not, file by file, what `manifest` says, or a manifest that is not `digest`'s.

    Raises:
        TrackingError: naming `model` and what is missing, altered or too much.
    """
    problems = [] if manifest_digest(manifest) == digest else [f"{NAME} has another sha256 than was recorded"]
    told: dict[str, Any] = json.loads(manifest)
    there = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    problems += [f"{name} is missing" for name in told if name not in there]
    problems += [f"{name} was not there" for name in there if name not in told]
    problems += [
        f"{name} was altered"
        for name, about in told.items()
        if name in there and (there[name].stat().st_size, sha256(there[name])) != (about["bytes"], about["sha256"])
    ]
    if problems:
        raise TrackingError(
            f"Registered model was altered (model={model}): {'; '.join(problems)}. Expected the files that were "
            "registered. Do not use it: roll back, or promote another version."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / NAME)
