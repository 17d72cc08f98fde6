"""One pass of a model over all questions: log-probabilities of every answer and answers of its own."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from components.batch_inference import map_batches
from components.config import Evaluation, Train, digest
from components.data.prepare import Prepared
from components.data.rows import PreparedRows
from components.evaluation.evaluate import reads_answers
from components.evaluation.shared_prompt import (
    Row,
    hidden_states,
    may_share,
    parts,
    shares,
    side_by_side,
    worth_sharing,
)
from components.files import whole_folder
from components.generation import Batching, find_batching, generate_answers, own_generation
from components.models import context_length, inference_device, load_model, load_tokenizer


def score(
    model: Path, model_hash: str, sets: dict[str, Prepared], evaluation: Evaluation, train: Train, storage: Path
) -> pa.Table:
    """Records of one model, made once and found again by (model, rows, settings).

    Columns: `set`, `row_id`, `question`, `answer`, `generated`, `paraphrased`, and `logp`: for each answer (the right
    one, its paraphrase if there is one, the wrong ones) the list of its tokens' log-probabilities, EOS included. Of the
    right answer's tokens also `mean` and `variance` of log p over the vocabulary, by the model's own p, and `hit`:
    whether the token is the likeliest. `generated`, the greedy answer, is null where no metric reads it; where they are
    asked for, `sampled` answers and the right answer's `gradient_norm`.
    """
    rows_of = {name: prepared.digest for name, prepared in sets.items()}
    tokens = evaluation.max_new_tokens
    with_answers = Asked(tokens, evaluation.samples, evaluation.temperature, evaluation.gradient_norms)
    asked = with_answers if reads_answers(evaluation) else with_answers._replace(max_new_tokens=0, samples=0)

    def place(asked: Asked) -> Path:
        made_of = [_FORMAT, model_hash, list(rows_of.items()), asked, train.dtype]
        return storage / "evaluations" / digest(made_of) / "records.parquet"

    file = next((file for file in (place(with_answers), place(asked)) if file.exists()), place(asked))
    if not file.exists():
        tables = []
        for name, prepared in sets.items():
            rows = PreparedRows(prepared.folder).table()
            tables.append(rows.append_column("set", pa.array([name] * rows.num_rows)))
        rows = pa.concat_tables(tables)
        lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in zip(*_ids(rows), strict=True)]
        outputs = map_batches(
            rows.select(["input_ids", "answers"]), Scorer, (str(model), train.dtype, asked),
            lengths=lengths, batch_size=evaluation.batch_size, train=train,
        )  # fmt: skip
        records = rows.select(["set", "row_id", "question", "answer", "paraphrased"])
        for column in outputs.column_names:
            records = records.append_column(column, outputs[column])
        with whole_folder(file.parent) as partial:
            pq.write_table(records, partial / file.name)
    return pq.read_table(file)


_FORMAT = 4
_LOGITS = 1 << 25  # in memory at a time


class Asked(NamedTuple):
    """What is wanted beside log-probabilities."""

    max_new_tokens: int
    """Of a generated answer; 0 for none."""
    samples: int
    """Drawn answers for each question."""
    temperature: float
    gradient_norms: bool


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

    def __init__(self, model: str, dtype: str, asked: Asked):
        self.device = inference_device()
        self.model = load_model(Path(model), dtype).to(self.device)
        self.shares_prompts: bool | None = None  # not known before the first row of several answers
        self.batching: Batching | None = None  # nor this before the first batch of several answers
        self.tokenizer = load_tokenizer(Path(model))
        self.ends = own_generation(self.model, self.tokenizer)
        self.room = context_length(Path(model))
        self.asked = asked

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        prompts, answers = _ids(rows)
        with torch.no_grad():
            per_row = self._score(prompts, answers)
            generated = self._generate(prompts) if self.asked.max_new_tokens else [[None]] * len(prompts)
            sampled = self._generate(prompts, self.asked.samples) if self.asked.samples else None
        numbers = pa.list_(pa.float32())
        columns = {
            "logp": pa.array([[one.logp for one in row] for row in per_row], pa.list_(numbers)),
            "mean": pa.array([row[0].mean for row in per_row], numbers),
            "variance": pa.array([row[0].variance for row in per_row], numbers),
            "hit": pa.array([row[0].hit for row in per_row], pa.list_(pa.bool_())),
            "generated": pa.array([greedy for [greedy] in generated], pa.string()),
        }
        if sampled is not None:
            columns["sampled"] = pa.array(sampled, pa.list_(pa.string()))
        if self.asked.gradient_norms:
            norms = [self._gradient_norm(p, candidates[0]) for p, candidates in zip(prompts, answers, strict=True)]
            columns["gradient_norm"] = pa.array(norms, pa.float32())
        return pa.table(columns)

    def _score(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> list[list[Scored]]:
        """Each prompt with all its answers in one row, where the model can; else each answer in a row of its own."""
        rows: list[Row] = []
        of: list[int] = []
        for i, (prompt, candidates) in enumerate(zip(prompts, answers, strict=True)):
            together = side_by_side(prompt, candidates)
            chosen = [together]
            if len(candidates) > 1 and not self._shares(together):
                chosen = [side_by_side(prompt, [answer]) for answer in candidates]
            rows += chosen
            of += [i] * len(chosen)
        scored: list[list[Scored]] = [[] for _ in prompts]
        for i, found in zip(
            of, (one for part in parts(rows, len(prompts)) for one in self._score_rows(part)), strict=True
        ):
            scored[i] += found
        return scored

    def _shares(self, row: Row) -> bool:
        hidden_size = self.model.config.get_text_config().hidden_size
        if not may_share(self.model, row) or not worth_sharing(row, hidden_size):
            return False
        if self.shares_prompts is None:  # batches come longest first
            self.shares_prompts = shares(self.model, row)
        return self.shares_prompts

    def _score_rows(self, rows: Sequence[Row]) -> Iterator[list[Scored]]:
        """What is said of each row's answers."""
        import torch

        hidden = hidden_states(self.model, rows)
        where = [(i, place) for i, row in enumerate(rows) for places in row.places for place in places]
        of_row, of_place = torch.tensor(where, device=self.device).T
        states = hidden[of_row, of_place]
        tokens = torch.tensor([t for row in rows for answer in row.answers for t in answer], device=self.device)
        at_once = max(1, _LOGITS // self.model.get_output_embeddings().weight.shape[0])
        pieces = zip(states.split(at_once), tokens.split(at_once), strict=True)
        columns = [torch.cat(found).tolist() for found in zip(*(self._of_tokens(*p) for p in pieces), strict=True)]
        first = 0
        for row in rows:
            ends = list(itertools.accumulate((len(answer) for answer in row.answers), initial=first))
            yield [Scored(*(column[a:b] for column in columns)) for a, b in itertools.pairwise(ends)]
            first = ends[-1]

    def _of_tokens(self, states: Any, tokens: Any) -> tuple[Any, Any, Any, Any]:
        """[n, hidden] states and the [n] tokens that follow → logp, mean, variance and hit, in fp32 or better."""
        return token_statistics(self.model.get_output_embeddings()(states).float(), tokens)

    def _gradient_norm(self, prompt: list[int], answer: list[int]) -> float:
        """L2 norm of the gradient of the mean −log p, averaged over the parameter tensors."""
        import torch

        row, tokens = side_by_side(prompt, [answer]), torch.tensor(answer, device=self.device)
        states = hidden_states(self.model, [row])[0][row.places[0]]
        parameters = list(self.model.parameters())
        loss = torch.nn.functional.cross_entropy(self.model.get_output_embeddings()(states).float(), tokens)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return float(torch.stack([g.float().norm() for g in found if g is not None]).mean())

    def _generate(self, prompts: list[list[int]], samples: int = 0) -> list[list[str]]:
        """The greedy answer to each prompt, or so many drawn ones, up to EOS."""
        new_tokens = self.asked.max_new_tokens
        limits = [new_tokens if self.room is None else min(new_tokens, self.room - len(p)) for p in prompts]
        if self.batching is None and len(prompts) * max(1, samples) > 1:
            longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
            self.batching = find_batching(self.model, prompts[longest], max(1, limits[longest]))
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            limits,
            self.batching or "one by one",
            self.ends,
            samples,
            self.asked.temperature,
        )


def token_statistics(logits: Any, tokens: Any) -> tuple[Any, Any, Any, Any]:
    """[n, vocabulary] logits and the [n] tokens that follow → logp, mean, variance and hit (`Scored`).

    A probability of 0, as of a padded vocabulary's tokens or of a collapsed model's, adds nothing to mean and variance.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    counted = logp.masked_fill(p == 0, 0.0)  # 0 · log 0 = 0
    mean = (p * counted).sum(-1)
    variance = (p * (counted - mean.unsqueeze(-1)) ** 2).sum(-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), mean, variance, logp.argmax(-1) == tokens


def _ids(rows: pa.Table) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(prompts, answers of each) as token ids."""
    return rows["input_ids"].to_pylist(), rows["answers"].to_pylist()
