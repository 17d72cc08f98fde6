"""The whole method in plain torch: three streams, the objective of Yao et al., SOUL's step. Read this first.

    python docs/plain_loop.py MODEL FORGET.jsonl NORMAL.jsonl RANDOM.jsonl OUTPUT

Each line of the three files is {"prompt": "...", "answer": "..."}; of RANDOM only the answers are used. A test shows
that the product, which adds ZeRO, workers, checkpoints and all else around this, ends with the same parameters.
"""

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax


class Settings(NamedTuple):
    """Names in the recipe; symbols in the papers."""

    forget_weight: float = 0.03  # ε1 of Yao et al. (arXiv 2310.10683)
    random_weight: float = 1.0  # ε2
    normal_weight: float = 1.0  # ε3
    responses: int = 1  # K random responses per forget prompt
    lr: float = 3e-4  # η of Sophia (arXiv 2305.14342), which SOUL applies to unlearning (arXiv 2404.18239)
    betas: tuple[float, float] = (0.9, 0.95)
    gamma: float = 30.0  # γ, which decides how many coordinates are clipped
    eps: float = 1e-15  # ε, the least denominator
    weight_decay: float = 0.0  # λ, of matrices only
    hessian_interval: int = 5  # k, steps between two refreshes of the Hessian
    gradient_clipping: float = 1.0
    batch_size: int = 24  # forget rows per step
    steps: int = 70
    seed: int = 0


Row = tuple[list[int], list[int]]  # token ids of the prompt and of the answer, EOS included


def draw(seed: int, purpose: str, counter: int) -> np.random.Generator:
    """A generator that depends on its arguments alone, so that no random state has to be carried from step to step."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, name], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, counter, 0]))


def in_order(seed: int, name: str, size: int, counter: int) -> int:
    """Element `counter` of an endless stream over `size` rows: every epoch is a new permutation."""
    epoch, place = divmod(counter, size)
    return int(draw(seed, f"{name}-order", epoch).permutation(size)[place])


def answer_logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[answer tokens, vocabulary]: the logits at the positions that predict the answer."""
    ids = torch.tensor([[*prompt, *answer]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def negative_log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Σ −log p(token) over the answer."""
    return cross_entropy(answer_logits(model, prompt, answer), torch.tensor(answer), reduction="sum")


def kl_to_original(model: Any, original: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Σ KL(original ‖ model) over the positions that predict the answer."""
    with torch.no_grad():
        p = log_softmax(answer_logits(original, prompt, answer), dim=-1)
    return (p.exp() * (p - log_softmax(answer_logits(model, prompt, answer), dim=-1))).sum()


def sampled_labels(logits: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
    """One label per position, drawn from the model's own distribution by its inverse cumulative sum."""
    sums = softmax(logits.detach().double(), dim=-1).cumsum(-1)
    found = torch.searchsorted(sums, torch.from_numpy(uniforms)[:, None] * sums[:, -1:], right=True)
    return found.squeeze(-1).clamp_max(sums.shape[1] - 1)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of `loss` for each parameter."""
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def unlearn(model: Any, forget: list[Row], normal: list[Row], random: list[Row], settings: Settings) -> None:
    """Make `model` forget, in place: θ ← θ − ε1·∇L_fgt − ε2·∇L_rdn − ε3·∇L_nor, preconditioned by SOUL."""
    s = settings
    original = copy.deepcopy(model).requires_grad_(False)
    parameters = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}  # momentum
    h = {name: torch.zeros_like(p) for name, p in parameters.items()}  # diagonal of the Hessian
    steps_per_epoch = -(-len(forget) // s.batch_size)
    for step in range(s.steps):
        # The forget rows pace the step; the normal rows cycle beside them; random responses are drawn for each prompt.
        epoch, place = divmod(step, steps_per_epoch)
        first, last = place * s.batch_size, min((place + 1) * s.batch_size, len(forget))
        counters = [epoch * len(forget) + i for i in range(first, last)]
        forget_rows = [forget[in_order(s.seed, "forget", len(forget), i)] for i in counters]
        normal_rows = [normal[in_order(s.seed, "normal", len(normal), i)] for i in counters]
        drawn = [draw(s.seed, "random", i).integers(len(random), size=s.responses) for i in counters]
        random_rows = [(row[0], random[j][1]) for row, chosen in zip(forget_rows, drawn, strict=True) for j in chosen]
        tokens = [sum(len(answer) for _, answer in rows) for rows in (forget_rows, random_rows, normal_rows)]

        # Every k steps: h ← β2·h + (1 − β2)·B·ĝ², ĝ being the gradient on labels that the model draws itself. Its
        # expectation is the diagonal of the Gauss-Newton matrix (Gauss-Newton-Bartlett).
        if step % s.hessian_interval == 0:
            loss = torch.zeros(())
            for counter, (prompt, answer) in zip(counters, normal_rows, strict=True):
                logits = answer_logits(model, prompt, answer)
                uniforms = draw(s.seed, f"labels-normal-{step}", counter).random(len(answer))
                loss = loss + cross_entropy(logits, sampled_labels(logits, uniforms), reduction="sum")
            for name, g in gradients(model, loss / tokens[2]).items():
                h[name] = s.betas[1] * h[name] + (1 - s.betas[1]) * tokens[2] * g**2

        # The objective. Each term is a mean over its answer tokens.
        forgetting = -sum(negative_log_likelihood(model, *row) for row in forget_rows) / tokens[0]
        answering = sum(negative_log_likelihood(model, *row) for row in random_rows) / tokens[1]
        keeping = sum(kl_to_original(model, original, *row) for row in normal_rows) / tokens[2]
        loss = s.forget_weight * forgetting + s.random_weight * answering + s.normal_weight * keeping
        grads = gradients(model, loss)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
        scale = min(1.0, s.gradient_clipping / (float(norm) + 1e-6))

        # θ ← θ·(1 − ηλ) − η·clip(m / max(γ·h, ε), 1)
        with torch.no_grad():
            for name, p in parameters.items():
                m[name] = s.betas[0] * m[name] + (1 - s.betas[0]) * scale * grads[name]
                p *= 1 - s.lr * (s.weight_decay if p.ndim >= 2 else 0.0)
                p -= s.lr * (m[name] / (s.gamma * h[name]).clamp(min=s.eps)).clamp(-1, 1)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, *files, output = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def rows_of(file: str) -> list[Row]:
        """Tokens of each line, the boundary between prompt and answer kept exact."""
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        texts = [(f"Question: {line['prompt']}\nAnswer:", f" {line['answer']}") for line in lines]
        ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in texts]
        return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in ids]

    trained = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    unlearn(trained, *map(rows_of, files), Settings())
    trained.save_pretrained(output)
    tokenizer.save_pretrained(output)
