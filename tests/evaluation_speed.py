"""What the TOFU suite costs, against a plain batched loop that scores each metric by itself as published code does.

    python -m tests.evaluation_speed MODEL FOLDER [SPLIT [LIMIT]]       (make bench-evaluation MODEL=… DATA=…)

MODEL is any model folder, FOLDER holds tofu/*.json as published, SPLIT is forget05 if left out, LIMIT takes only the
first so many questions of each set.
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


def ours(model: Model, prepared: Any, evaluation: Evaluation, *, answers: bool, always: bool) -> tuple[float, int]:
    """(seconds, rows forwarded to score) of one pass; prompts are shared `always`, or where it pays."""
    forwarded = 0
    plain, worth = scoring.hidden_states, scoring.worth_sharing

    def counted(model: Any, rows: Sequence[Any]) -> Any:
        nonlocal forwarded
        forwarded += len(rows)
        return plain(model, rows)

    scoring.hidden_states = counted
    scoring.worth_sharing = (lambda row, hidden_size: True) if always else worth
    asked = evaluation if answers else evaluation.model_copy(update={"metrics": ["forget_probability"]})
    with tempfile.TemporaryDirectory() as storage:
        started = time.perf_counter()
        scoring.score(model.folder, model.hash, prepared, asked, Train(workers=0), Path(storage))
        seconds = time.perf_counter() - started
    scoring.hidden_states, scoring.worth_sharing = plain, worth
    return seconds, forwarded


def main(folder: str, data: str, split: str = "forget05", limit: str = "") -> None:
    """Print sequences, seconds and ratios."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as storage:
        suites = ["suite=tofu", *([] if split == "forget10" else [f"suite=tofu-{split}"])]
        more = [f"data.folder={data}", f"storage={storage}", "data.max_bad_fraction=1.0"]
        recipe = parse_arguments([folder, *suites, *more], takes_words=True).recipe
        evaluation = recipe.evaluation
        for name, questions in evaluation.sets.items() if limit else ():
            rows = [source.model_copy(update={"limit": int(limit)}) for source in questions.rows]
            evaluation.sets[name] = questions.model_copy(update={"rows": rows})
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
        found = {
            "one pass, prompts shared where it pays": ours(model, prepared, evaluation, answers=False, always=False),
            "one pass, prompts always shared": ours(model, prepared, evaluation, answers=False, always=True),
            "one pass with generated answers": ours(model, prepared, evaluation, answers=True, always=False),
        }
    published = sum(map(len, passes))
    print(f"TOFU {split}: {sum(map(len, sets.values()))} questions, {folder}, {torch.get_num_threads()} threads")
    rows = [["plain loop, each metric by itself", f"{published:,}", f"{plain:.1f} s", "1", "1"]]
    for name, (seconds, forwarded) in found.items():
        ratios = [f"{published / forwarded:.2f}", f"{plain / seconds:.2f}"]
        rows.append([name, f"{forwarded:,}", f"{seconds:.1f} s", *ratios])
    print(table(["scoring", "sequences", "seconds", "fewer", "faster"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
