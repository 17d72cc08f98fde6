"""docs/plain_loop.py, the method on one page, is what the product does."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components.data.rows import PreparedRows
from components.files import read_lines
from components.models import load_model, load_tokenizer
from tests.training import OBJECTIVE, SOUL, TRAIN, distance, run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plain_loop.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(folder: str | None) -> list[tuple[list[int], list[int]]]:
    prepared = PreparedRows(Path(folder or ""))
    return [(prepared.prompt(i).tolist(), prepared.answer(i).tolist()) for i in range(len(prepared))]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_product_gives_the_same_parameters(
    page: ModuleType, make_job: Any, tmp_path: Path, zero_stage: int
) -> None:
    """Over four epochs of the forget set, the last batch of each a short one.

    With K = 2, clipping, weight decay and three refreshes of the Hessian.
    """
    steps = 8
    job = make_job("product", TRAIN.model_copy(update={"steps": steps, "zero_stage": zero_stage}))
    settings = page.Settings(
        forget_weight=OBJECTIVE.forget.weight, random_weight=OBJECTIVE.random.weight,
        normal_weight=OBJECTIVE.normal.weight, responses=OBJECTIVE.random.responses, lr=SOUL.lr, betas=SOUL.betas,
        gamma=SOUL.gamma, eps=SOUL.eps, weight_decay=SOUL.weight_decay, hessian_interval=SOUL.hessian_interval,
        gradient_clipping=TRAIN.gradient_clipping, batch_size=TRAIN.batch_size, steps=steps, seed=job.seed,
    )  # fmt: skip
    model = load_model(Path(job.model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    page.unlearn(model, rows(job.forget), rows(job.normal), rows(job.random), settings)
    after = dict(model.named_parameters())
    assert distance(run(job, tmp_path), after) < 1e-5
    assert distance(before, after) > 5e-3
    norms = [line["train/grad_norm"] for line in read_lines(Path(job.metrics))]
    assert max(norms) > TRAIN.gradient_clipping  # some steps are clipped


def test_the_page_is_short_and_stands_alone() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    modules = {name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for name in [node.module]}
    assert not any(module and module.startswith(("components", "pipelines", "deepspeed", "ray")) for module in modules)


def test_the_page_runs_as_it_says(base: Path, tmp_path: Path) -> None:
    for name in ("forget", "normal", "random"):
        lines = [json.dumps({"prompt": f"Who is {name} {i}?", "answer": f"Nobody {i}."}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("forget", "normal", "random")]
    done = subprocess.run(
        [sys.executable, str(PAGE), str(base), *files, str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    changed = load_model(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").eos_token_id == load_tokenizer(base).eos_token_id
    assert distance(dict(load_model(base).named_parameters()), dict(changed.named_parameters())) > 1e-3
