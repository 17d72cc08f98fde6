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
from components.generation import find_batching, own_generation
from components.models import context_length, inference_device, load_model, load_tokenizer, without_warnings

_FORMAT = 2  # raise when the same files give other numbers


def general_ability(folder: Path, model_hash: str, config: LmEval, storage: Path) -> dict[str, float]:
    """`lm_eval_<task>_<metric>` of the model in `folder`, made once and found again.

    Raises:
        ConfigError: when the harness is not installed.
        ModelError: when the model cannot be loaded.
        DataError: when a task cannot be had.
    """
    own = sorted(Path(config.include_path).rglob("*.yaml")) if config.include_path else []
    made_from = [_FORMAT, model_hash, config.model_dump(mode="json"), [sha256(file) for file in own], _version()]
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
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "evaluation.lm_eval needs EleutherAI's harness, which is not installed. Install it: "
            "pip install 'ray-unlearn[lm-eval]', or leave evaluation.lm_eval out."
        ) from error
    # Loaded here, and not by the harness: no code of the folder is run, and no weight is made up.
    model, tokenizer = load_model(folder, "auto").to(inference_device()), load_tokenizer(folder)
    try:
        manager = TaskManager(include_path=config.include_path)
        with without_warnings(), silent_stderr():  # a bar for each of its phases
            harness = HFLM(
                model, tokenizer=tokenizer, batch_size=config.batch_size, device=str(model.device),
                max_length=context_length(folder),
            )  # fmt: skip
            own_generation(model, tokenizer)
            if find_batching(model) != "padded":
                harness.batch_size_per_gpu = 1
            outcome: Any = lm_eval.simple_evaluate(
                model=harness, tasks=list(config.tasks), num_fewshot=config.shots, limit=config.limit,
                log_samples=False, task_manager=manager,
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
