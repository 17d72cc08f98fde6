"""One pass of a model over all questions: log-probabilities of every answer and one greedy answer of its own."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from components.batch_inference import map_batches
from components.config import Evaluation, Train, digest
from components.data.prepare import Prepared
from components.data.rows import PreparedRows
from components.files import whole_folder
from components.models import answer_text, context_length, inference_device, load_model, load_tokenizer


def score(
    model: Path, model_hash: str, sets: dict[str, Prepared], evaluation: Evaluation, train: Train, storage: Path
) -> pa.Table:
    """Records of one model, made once and found again by (model, rows, settings).

    Columns: `set`, `row_id`, `question`, `answer`, `generated`, `paraphrased`, and `logp`: for each answer (the right
    one, its paraphrase if there is one, the wrong ones) the list of its tokens' log-probabilities, EOS included. Of the
    right answer's tokens also `mean` and `variance` of log p over the vocabulary, by the model's own p, and `hit`:
    whether the token is the likeliest.
    """
    rows_of = {name: prepared.digest for name, prepared in sets.items()}
    key = digest([_FORMAT, model_hash, rows_of, evaluation.max_new_tokens, train.dtype])
    file = storage / "evaluations" / key / "records.parquet"
    if not file.exists():
        tables = []
        for name, prepared in sets.items():
            rows = PreparedRows(prepared.folder).table()
            tables.append(rows.append_column("set", pa.array([name] * rows.num_rows)))
        rows = pa.concat_tables(tables)
        outputs = map_batches(
            rows.select(["input_ids", "answers"]), Scorer, (str(model), train.dtype, evaluation.max_new_tokens),
            lengths=pa.compute.list_value_length(rows["input_ids"]), batch_size=evaluation.batch_size, train=train,
        )  # fmt: skip
        records = rows.select(["set", "row_id", "question", "answer", "paraphrased"])
        for column in outputs.column_names:
            records = records.append_column(column, outputs[column])
        with whole_folder(file.parent) as partial:
            pq.write_table(records, partial / file.name)
    return pq.read_table(file)


_FORMAT = 2
_POSITIONS = 256  # whose logits are in memory at a time


class Scored(NamedTuple):
    """What a model says of one answer, token by token."""

    logp: list[float]
    mean: list[float]
    """Σ p log p over the vocabulary: minus the entropy."""
    variance: list[float]
    """Σ p (log p)² − mean²."""
    hit: list[bool]


class Scorer:
    """Batch inference on prompts with their candidate answers."""

    def __init__(self, model: str, dtype: str, max_new_tokens: int):
        self.folder = Path(model)
        self.device = inference_device()
        self.model = load_model(Path(model), dtype).to(self.device)
        self.tokenizer = load_tokenizer(Path(model))
        self.max_new_tokens = max_new_tokens

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        prompts, answers = rows["input_ids"].to_pylist(), rows["answers"].to_pylist()
        with torch.no_grad():
            scored = iter(self._score(prompts, answers))
            per_row = [[next(scored) for _ in candidates] for candidates in answers]
            generated = self._generate(prompts)
        numbers = pa.list_(pa.float32())
        return pa.table(
            {
                "logp": pa.array([[one.logp for one in row] for row in per_row], pa.list_(numbers)),
                "mean": pa.array([row[0].mean for row in per_row], numbers),
                "variance": pa.array([row[0].variance for row in per_row], numbers),
                "hit": pa.array([row[0].hit for row in per_row], pa.list_(pa.bool_())),
                "generated": pa.array(generated, pa.string()),
            }
        )

    def _score(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> list[Scored]:
        """Each (prompt, answer) pair, forwarded once."""
        import torch

        pairs = [(p, a) for p, candidates in zip(prompts, answers, strict=True) for a in candidates]
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(p + a, device=self.device) for p, a in pairs], batch_first=True
        )
        hidden = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        out = []
        for row, (prompt, answer) in enumerate(pairs):
            states = hidden[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            tokens = torch.tensor(answer, device=self.device)
            split = zip(states.split(_POSITIONS), tokens.split(_POSITIONS), strict=True)
            parts = [self._of_tokens(*part) for part in split]
            out.append(Scored(*(torch.cat(values).tolist() for values in zip(*parts, strict=True))))
        return out

    def _of_tokens(self, states: Any, tokens: Any) -> tuple[Any, Any, Any, Any]:
        """[n, hidden] states and the [n] tokens that follow → logp, mean, variance and hit, in fp32 or better."""
        logp = self.model.get_output_embeddings()(states).float().log_softmax(-1)
        p = logp.exp()
        mean = (p * logp).sum(-1)
        variance = (p * (logp - mean.unsqueeze(-1)) ** 2).sum(-1)
        return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), mean, variance, logp.argmax(-1) == tokens

    def _generate(self, prompts: list[list[int]]) -> list[str]:
        """Greedy answers, up to EOS."""
        import torch

        eos = self.tokenizer.eos_token_id
        width = max(map(len, prompts))
        room = context_length(self.folder)
        new_tokens = self.max_new_tokens if room is None else min(self.max_new_tokens, room - width)
        padded = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        output = self.model.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=eos
        )
        return [answer_text(self.tokenizer, ids) for ids in output[:, width:].tolist()]
