"""Every metric that comes from log-probabilities, computed again in float64 from whole logits, in another way."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp

from components.config import Data, Evaluation, Files, Train
from components.data.prepare import Prepared, prepare
from components.data.rows import PreparedRows
from components.evaluation.evaluate import evaluate_records, reference_of
from components.evaluation.scoring import score
from components.models import fingerprint, load_tokenizer, tokenizer_facts

WORDS = ["a", "bird", "of", "the", "north", "sings", "on", "its", "own", "old", "roof", "while", "it", "rains"]


def write(folder: Path, name: str, count: int, seed: int) -> Files:
    """Answers of one letter to twelve words, a paraphrase and one to four wrong ones; some begin alike."""
    draw = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(1, 13)))

    rows = [
        {"question": f"{name} {i}: {text()}?", "answer": "x" if i % 5 == 0 else text(), "other": text(),
         "wrong": ["y", *(text() for _ in range(draw.integers(0, 4)))]}
        for i in range(count)
    ]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"paraphrased_answer": "other", "perturbed_answer": "wrong"}
    return Files(type="files", path=str(folder / f"{name}.jsonl"), **columns)


def test_every_metric_again(ray_cluster: None, base: Path, tmp_path: Path) -> None:
    sets = {name: {"rows": [write(tmp_path, name, count, i)]} for i, (name, count) in enumerate(
        {"forget": 11, "holdout": 7, "retain": 9, "facts": 6}.items())}  # fmt: skip
    sets["facts"]["normalised"] = True  # type: ignore[assignment]
    evaluation = Evaluation(sets=sets, utility=["retain", "facts"], max_new_tokens=4, batch_size=4)  # type: ignore[arg-type]
    facts = tokenizer_facts(load_tokenizer(base))
    prepared = {n: prepare(s.rows, "questions", Data(), facts, tmp_path) for n, s in evaluation.sets.items()}
    records = score(base, fingerprint(base), prepared, evaluation, Train(workers=0), tmp_path)
    found = evaluate_records(records, reference_of(records), evaluation).values
    again = {name: [tokens_of(base, row) for row in rows_of(p)] for name, p in prepared.items()}
    mean = {name: [[float(a.logp.mean()) for a in row] for row in rows] for name, rows in again.items()}

    for name, rows in again.items():
        right = [math.exp(m[0]) for m in mean[name]]
        if name == "facts":
            right = [p / (p + sum(map(math.exp, m[2:]))) for p, m in zip(right, mean[name], strict=True)]
        assert found[f"{name}_probability"] == pytest.approx(np.mean(right), abs=1e-5)
        ratios = [np.prod([math.exp(x) for x in m[2:]]) ** (1 / len(m[2:])) / math.exp(m[1]) for m in mean[name]]
        told = [min(r, 1 / r) if name == "forget" else max(0, 1 - r) for r in ratios]
        assert found[f"{name}_truth_ratio"] == pytest.approx(np.mean(told), abs=1e-5)
        hits = [row[0].hit[:-1] for row in rows]
        assert found[f"{name}_exact_memorization"] == pytest.approx(np.mean([np.mean(h) for h in hits]), abs=1e-6)
        tails = [next((1 - k / len(h) for k in range(len(h)) if all(h[k:])), 0.0) for h in hits]
        assert found[f"{name}_extraction_strength"] == pytest.approx(np.mean(tails), abs=1e-6)
        whole = torch.cat([row[0].logp for row in rows])
        assert found[f"{name}_perplexity"] == pytest.approx(float((-whole.mean()).exp()), rel=1e-5)
        chosen = [[float(a.logp[:-1].mean()) for a in (row[0], *row[2:])] for row in rows]
        assert found[f"{name}_choice"] == np.mean([np.argmax(c) == 0 for c in chosen])

    scores = {
        "loss": lambda row: -row[0].logp.mean(),
        "min_k": lambda row: -lowest(row[0].logp[:-1]),
        "min_k_plus_plus": lambda row: -lowest(((row[0].logp - row[0].mu) / row[0].sigma)[:-1]),
    }
    for name, of in scores.items():
        ours, others = ([float(of(row)) for row in again[s]] for s in ("forget", "holdout"))
        pairs = [(b > a) + (b == a) / 2 for a in ours for b in others]
        assert found[f"mia_{name}"] == pytest.approx(np.mean(pairs), abs=1e-9), name
    utility = [found[f"{s}_{m}"] for s in ("retain", "facts") for m in ("probability", "rouge", "truth_ratio")]
    assert found["model_utility"] == pytest.approx(hmean(utility) if min(utility) > 0 else 0)

    changed = [m[2:] for m in mean["forget"]]
    logs = [float(np.mean(wrong)) - m[1] for wrong, m in zip(changed, mean["forget"], strict=True)]
    halved = [log / 2 for log in logs]
    other = reference_of(records)._replace(log_truth_ratios=halved)
    quality = evaluate_records(records, other, evaluation).values["forget_quality"]
    assert quality == pytest.approx(ks_2samp(np.exp(logs), np.exp(halved)).pvalue)


class Answer:
    """What the model says of one answer: whole logits of prompt and answer alone, in float64."""

    def __init__(self, model: Any, prompt: list[int], answer: list[int]):
        with torch.no_grad():
            said = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        self.logp = said.gather(1, torch.tensor(answer)[:, None])[:, 0]
        self.hit = (said.argmax(-1) == torch.tensor(answer)).tolist()
        self.mu = (said.exp() * said).sum(-1)
        self.sigma = ((said.exp() * said**2).sum(-1) - self.mu**2).sqrt()


@functools.cache
def model_of(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).double()


def tokens_of(base: Path, row: dict[str, Any]) -> list[Answer]:
    return [Answer(model_of(base), row["input_ids"], answer) for answer in row["answers"]]


def rows_of(prepared: Prepared) -> list[dict[str, Any]]:
    return PreparedRows(prepared.folder).table().to_pylist()


def lowest(values: torch.Tensor) -> torch.Tensor:
    return values.sort().values[: max(1, int(0.4 * len(values)))].mean()
