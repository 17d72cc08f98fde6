"""What a run was made with: libraries, code and machines."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

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


def code_commit() -> str | None:
    """Of the code that runs, with `-dirty` where it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
