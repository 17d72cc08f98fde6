"""What the TOFU suite costs, against a plain batched loop that scores each metric by itself as published code does.

    python -m tests.evaluation_speed MODEL FOLDER [SPLIT]       (make bench-evaluation MODEL=… DATA=…)

MODEL is any model folder, FOLDER holds tofu/*.json as published, SPLIT is forget05 if left out.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from components.config import Evaluation, Train
from components.console import table
from components.data.rows import PreparedRows
from components.evaluation import scoring
from components.models import fingerprint, load_model, quiet_libraries
from pipelines.cli import parse_arguments, ray_session
from pipelines.evaluate import prepare_questions
from pipelines.finetune import Model

Pair = tuple[list[int], list[int]]
_BATCH = 32


def plain_score(model: Any, pairs: Sequence[Pair]) -> None:
    """Log-probability per token of each answer: right-padded, in the order of the file, whole logits."""
    for first in range(0, len(pairs), _BATCH):
        part = pairs[first : first + _BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + a) for p, a in part], batch_first=True)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits.float()
        for row, (prompt, answer) in enumerate(part):
            said = logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].log_softmax(-1)
            said.gather(-1, torch.tensor(answer)[:, None]).mean().item()


def published_passes(sets: dict[str, list[dict[str, Any]]]) -> list[list[Pair]]:
    """One list of pairs for each metric: probability, truth ratio, min-k and extraction strength of the forget set;
    probability and truth ratio of the others."""

    def pairs(name: str, answers: slice) -> list[Pair]:
        return [(row["input_ids"], answer) for row in sets[name] for answer in row["answers"][answers]]

    right, others = slice(0, 1), slice(1, None)
    passes = [pairs("forget", right), pairs("forget", others), pairs("forget", right), pairs("forget", right)]
    for name in ("retain", "real_authors", "world_facts"):
        passes += [pairs(name, right), pairs(name, others)]
    return passes


def ours(model: Model, prepared: Any, evaluation: Evaluation, answers: bool) -> tuple[float, int]:
    """(seconds, rows forwarded to score) of one pass into an empty storage."""
    forwarded = 0
    plain = scoring.hidden_states

    def counted(model: Any, rows: Sequence[Any]) -> Any:
        nonlocal forwarded
        forwarded += len(rows)
        return plain(model, rows)

    scoring.hidden_states = counted
    asked = evaluation if answers else evaluation.model_copy(update={"metrics": ["forget_probability"]})
    with tempfile.TemporaryDirectory() as storage:
        started = time.perf_counter()
        scoring.score(model.folder, model.hash, prepared, asked, Train(workers=0), Path(storage))
        seconds = time.perf_counter() - started
    scoring.hidden_states = plain
    return seconds, forwarded


def main(folder: str, data: str, split: str = "forget05") -> None:
    """Print sequences, seconds and ratios."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as storage:
        suites = ["suite=tofu", *([] if split == "forget10" else [f"suite=tofu-{split}"])]
        more = [f"data.folder={data}", f"storage={storage}", "data.max_bad_fraction=1.0"]
        recipe = parse_arguments([folder, *suites, *more], takes_models=True).recipe
        model = Model(Path(folder), fingerprint(Path(folder)))
        with ray_session():
            prepared = prepare_questions(recipe, model)
        sets = {name: PreparedRows(found.folder).table().to_pylist() for name, found in prepared.items()}
        passes = published_passes(sets)
        loaded = load_model(Path(folder))
        started = time.perf_counter()
        for pairs in passes:
            plain_score(loaded, pairs)
        plain = time.perf_counter() - started
        seconds, forwarded = ours(model, prepared, recipe.evaluation, answers=False)
        with_answers, _ = ours(model, prepared, recipe.evaluation, answers=True)
    published = sum(map(len, passes))
    print(f"TOFU {split}: {sum(map(len, sets.values()))} questions, {folder}, {torch.get_num_threads()} threads")
    rows = [
        ["plain loop, each metric by itself", f"{published:,}", f"{plain:.1f} s", "1", "1"],
        ["one pass", f"{forwarded:,}", f"{seconds:.1f} s", f"{published / forwarded:.2f}", f"{plain / seconds:.2f}"],
        ["one pass, with generated answers", f"{forwarded:,}", f"{with_answers:.1f} s", "", ""],
    ]
    print(table(["scoring", "sequences", "seconds", "fewer", "faster"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
