"""What the original model says of the rows, computed once: no second model sits in memory while training.

Only rows that the job's steps use are passed through the model, length-bucketed, in parts that the workers write
themselves; what a later job with the same rows needs is found again.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from components.batch_inference import run_parts
from components.config import Objective, digest
from components.console import rows_line
from components.data.rows import PreparedRows
from components.data.streams import Plan
from components.files import map_arrow, whole_folder, write_arrow
from components.models import hidden_size, inference_device, load_model
from components.training.job import Job, make_plan, open_sets, total_steps

What = Literal["hidden", "states", "logp"]
"""hidden: last hidden states, which times the frozen output layer give the logits exactly. states: outputs of the
objective's layer. logp: log-probabilities."""

_PART = 256  # sequences that one task passes through the model and writes to one file
_TELL_EVERY = 3.0  # seconds


class _Sequences(NamedTuple):
    """What goes through the model."""

    keys: np.ndarray
    """[n] sorted: row index for forget and normal; row counter x K + k for the k-th random response."""
    prompts: np.ndarray
    """[n] row indices of the prompts."""
    answers: np.ndarray
    """[n] row indices of the answers."""


def needs(objective: Objective) -> dict[str, What]:
    """What each group's term asks of the original model."""
    from components.objectives.terms import find_term  # imports torch

    asked: dict[str, What] = {"original_logits": "hidden", "original_states": "states", "original_logp": "logp"}
    wanted: dict[str, What] = {}
    for group, config in objective.terms().items():
        for name in find_term(config).inputs:
            if name in asked:
                wanted[group] = asked[name]
            elif name == "chosen_original_logp":
                wanted["random"] = "logp"
    return wanted


def reference_pass(
    job: Job, group: str, what: What, model_hash: str, storage: Path, tell: Callable[[str], None] | None = None
) -> Path:
    """Folder with what the job's model says of the answers of `group`; read it with `Reference`.

    Found again by (model, rows, dtype). `tell` gets a line of progress every few seconds.
    """
    sets = open_sets(job)
    plan = make_plan(job, sets)
    sequences = _sequences(group, plan, total_steps(job, plan))
    sources = {
        "forget": (job.forget, job.forget, None),
        "random": (job.forget, job.random, None),
        "normal": (job.normal, job.normal, job.normal_without),
    }[group]
    layer = job.objective.layer if what == "states" else None
    made_from = {
        "format": 2, "model": model_hash, "dtype": job.train.dtype, "what": what, "layer": layer,
        "rows": [source and "/".join(Path(source).parts[-2:]) for source in sources],
        "sequences": [hashlib.sha256(array.tobytes()).hexdigest() for array in sequences],
    }  # fmt: skip
    folder = storage / "reference" / f"{group}-{what}-{digest(made_from, 24)}"
    if folder.exists():
        return folder
    with whole_folder(folder) as partial:
        for name, array in sequences._asdict().items():
            np.save(partial / f"{name}.npy", array)
        about = {"what": what, "dtype": job.train.dtype, "size": hidden_size(Path(job.model), what == "hidden")}
        (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
        if what == "hidden":
            _save_head(Path(job.model), job.train.dtype, partial / "head.safetensors")
        arguments = (job.model, job.train.dtype, what, layer, sources, str(partial), 4 * job.train.micro_batch_size)
        started = told = time.monotonic()
        done = 0
        for size in run_parts(-(-len(sequences.keys) // _PART), ReferenceWorker, arguments, job.train):
            done += size
            if tell and time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                tell(rows_line(done, told - started, done / len(sequences.keys)))
    return folder


def _sequences(group: str, plan: Plan, steps: int) -> _Sequences:
    if group == "normal":
        rows = plan.normal_rows(steps)
        return _Sequences(rows, rows, rows)
    if group == "forget":
        rows = np.unique(np.concatenate([plan.step_rows(s).forget for s in range(min(steps, plan.steps_per_epoch))]))
        return _Sequences(rows, rows, rows)
    used = [plan.step_rows(step) for step in range(steps)]
    counters = np.concatenate([rows.counter for rows in used])
    k = plan.responses
    return _Sequences(
        keys=(counters[:, None] * k + np.arange(k)).ravel(),
        prompts=np.repeat(np.concatenate([rows.forget for rows in used]), k),
        answers=np.concatenate([rows.random for rows in used]).ravel(),
    )


def _save_head(model: Path, dtype: str, file: Path) -> None:
    from safetensors.torch import save_file

    head = load_model(model, dtype).get_output_embeddings()
    tensors = {"weight": head.weight.detach().clone()}
    if getattr(head, "bias", None) is not None:
        tensors["bias"] = head.bias.detach().clone()
    save_file(tensors, file)


class ReferenceWorker:
    """Batch inference of one part: reads the rows, writes `part-<number>.arrow`, returns the number of sequences."""

    def __init__(
        self, model: str, dtype: str, what: What, layer: int | None, sources: tuple[str, str, str | None],
        folder: str, batch_size: int,
    ):  # fmt: skip
        from components.layers import Watch, check_layer, cut_after

        prompts, answers, without = sources
        self.prompts = PreparedRows(Path(prompts), Path(without) if without else None)
        self.answers = self.prompts if answers == prompts else PreparedRows(Path(answers))
        self.folder, self.what, self.batch_size = Path(folder), what, batch_size
        self.rows = [np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("prompts", "answers")]
        self.device = inference_device()
        self.model = load_model(Path(model), dtype).to(self.device)
        self.watch: Any = None
        if layer is not None:
            check_layer(self.model, layer)
            self.watch = None if cut_after(self.model, layer) else Watch(self.model, layer)

    def __call__(self, part: int) -> int:
        here = slice(part * _PART, (part + 1) * _PART)
        pairs = [
            (self.prompts.prompt(int(i)), self.answers.answer(int(j)))
            for i, j in zip(*(array[here] for array in self.rows), strict=True)
        ]
        order = np.argsort([-len(prompt) - len(answer) for prompt, answer in pairs], kind="stable")
        results: list[Any] = [None] * len(pairs)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for i, result in zip(chosen, self._pass([pairs[i] for i in chosen]), strict=True):
                results[i] = result
        kind = pa.list_(pa.float32()) if self.what == "logp" else pa.large_binary()
        table = pa.table({self.what: pa.array(results, kind)})
        write_arrow(table, self.folder / f"part-{part:06d}.arrow")
        return len(pairs)

    def _pass(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        import torch

        ids = [torch.from_numpy(np.concatenate(pair).astype(np.int64)) for pair in pairs]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)
        out = []
        with torch.no_grad():
            states = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
            states = self.watch.take() if self.watch else states
            for row, (prompt, answer) in enumerate(pairs):
                own = states[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
                if self.what != "logp":
                    out.append(own.contiguous().cpu().view(torch.uint8).numpy().tobytes())
                    continue
                targets = torch.from_numpy(answer.astype(np.int64)).to(self.device)
                logits = self.model.get_output_embeddings()(own).float()
                out.append((-torch.nn.functional.cross_entropy(logits, targets, reduction="none")).cpu().numpy())
        return out


class Reference:
    """The original model's word on one group's answers, read memory-mapped from a `reference_pass` folder."""

    def __init__(self, folder: Path, device: Any = "cpu"):
        import torch
        from safetensors.torch import load_file

        self._folder = folder
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._part = functools.lru_cache(maxsize=128)(self._open_part)
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.what: What = about["what"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[about["dtype"]]
        self.no_states = torch.empty(0, about["size"], dtype=dtype)
        file = folder / "head.safetensors"  # of a pass for hidden states
        self._head = load_file(file, device=str(device)) if file.exists() else {}

    def states(self, key: int) -> Any:
        """[answer tokens, hidden size] states (last ones, or a layer's) at the positions that predict the answer."""
        import torch

        flat = torch.frombuffer(bytearray(self._find(key).as_buffer()), dtype=self.no_states.dtype)
        return flat.view(-1, self.no_states.shape[1])

    def logp(self, key: int) -> Any:
        """[answer tokens] log-probabilities of the answer's tokens."""
        import torch

        return torch.from_numpy(self._find(key).values.to_numpy().copy())

    def logits(self, hidden: Any) -> Any:
        """[n, hidden size] → [n, vocabulary], exactly the original's."""
        import torch

        return torch.nn.functional.linear(hidden, self._head["weight"], self._head.get("bias"))

    def _find(self, key: int) -> Any:
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise IndexError(f"no reference for key {key} in {self._folder}")
        return self._part(place // _PART)[self.what].chunk(0)[place % _PART]

    def _open_part(self, part: int) -> pa.Table:
        return map_arrow(self._folder / f"part-{part:06d}.arrow")
