"""General ability by EleutherAI's lm-evaluation-harness, an optional extra: its tasks beside our own metrics."""

import importlib.metadata
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.config import LmEval, digest
from components.console import silent_stderr
from components.errors import ConfigError, DataError
from components.files import sha256, write_whole
from components.models import inference_device, without_warnings


def general_ability(folder: Path, model_hash: str, config: LmEval, storage: Path) -> dict[str, float]:
    """`lm_eval_<task>_<metric>` of the model in `folder`, made once and found again.

    Raises:
        ConfigError: when the harness is not installed.
        DataError: when a task cannot be had.
    """
    own = sorted(Path(config.include_path).rglob("*.yaml")) if config.include_path else []
    made_from = [model_hash, config.model_dump(mode="json"), [sha256(file) for file in own], _version()]
    kept = storage / "evaluations" / f"lm-eval-{digest(made_from)}.json"
    if not kept.exists():
        found = _run(folder, config)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(found))
    return json.loads(kept.read_text(encoding="utf-8"))


def _version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("lm_eval")
    return ""


def _run(folder: Path, config: LmEval) -> dict[str, float]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with without_warnings():
            import lm_eval
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "evaluation.lm_eval needs EleutherAI's harness, which is not installed. Install it: "
            "pip install 'ray-unlearn[lm-eval]', or leave evaluation.lm_eval out."
        ) from error
    try:
        manager = TaskManager(include_path=config.include_path)
        with without_warnings(), silent_stderr():  # a bar for each of its phases
            outcome: Any = lm_eval.simple_evaluate(
                model="hf", model_args={"pretrained": str(folder), "trust_remote_code": False},
                tasks=list(config.tasks), num_fewshot=config.shots, limit=config.limit, batch_size=config.batch_size,
                log_samples=False, device=str(inference_device()), task_manager=manager,
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:  # data sets are fetched by the harness
        raise DataError(
            f"Task of lm-eval cannot be had (tasks={list(config.tasks)}): {type(error).__name__} {str(error)[:300]}. "
            "Expected names that `lm_eval ls tasks` shows, and their data within reach."
        ) from error
    return {
        f"lm_eval_{task}_{metric.removesuffix(',none').replace(',', '_')}": float(value)
        for task, about in outcome["results"].items()
        for metric, value in about.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
