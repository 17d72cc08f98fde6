"""What a run was made with: libraries, code and machines."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from components.tracking.run import without_filter_texts
from components.urls import without_secrets

_LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "datasets", "mlflow")


def versions() -> str:
    """Of the libraries that decide numbers."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES[:-1])


def environment() -> dict[str, Any]:
    """Libraries, Python, system, our own commit, and what the Ray cluster has."""
    import ray

    return {
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": code_commit(),
        "nodes": [
            {key: node["Resources"][key] for key in sorted(node["Resources"]) if not key.startswith("node:")}
            for node in ray.nodes()
            if node["Alive"]
        ],
    }


def command() -> str:
    """The command that runs, as it may be stored: without secrets in URLs and texts that filters compare with."""
    return without_secrets(shlex.join(["python", *map(_shown, sys.argv)]))


def _shown(argument: str) -> str:
    name, _, value = argument.partition("=")
    if "where" not in argument or not value:
        return argument
    try:
        last = name.rpartition(".")[2]
        [shown] = without_filter_texts({last: yaml.safe_load(value)}).values()
        return f"{name}={json.dumps(shown, ensure_ascii=False)}"
    except yaml.YAMLError:
        return f"{name}=…"


def code_commit() -> str | None:
    """Of the code that runs, with `-dirty` where it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
