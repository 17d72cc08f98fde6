"""The recipe: every setting, its meaning and its default. Nothing here imports torch or Ray.

One schema serves all pipelines, so that one file describes a whole job. A string under a field documents it.
"""

import ast
import hashlib
import json
import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


# --- data ------------------------------------------------------------------------------------------------------------


class Rows(Section):
    """What to take from each record of a source."""

    prompt: str = "question"
    """Column of the prompt, or a text with columns in braces, such as `"{knowledge}\n{question}"`. A column may also
    hold a list of chat messages, each with role and content."""
    answer: str = "answer"
    """Column of the answer, or a text with columns in braces. A list of texts makes a row for each."""
    split_answers: str | None = Field(None, min_length=1)
    """Separator of several answers in one field, such as `"; "`: each makes a row."""
    dialogue: str | None = None
    """Column of a whole dialogue, in place of prompt and answer: a list of chat messages, or text whose turns begin
    with `turns`. Its last turn is the answer."""
    turns: tuple[str, str] = ("\n\nHuman:", "\n\nAssistant:")
    """What a user's and an assistant's turn begin with in a dialogue's text."""
    paraphrased_answer: str | None = None
    """Column with a true answer in other words (evaluation only)."""
    perturbed_answer: str | None = None
    """Column with a list of wrong answers of the same form (evaluation only)."""
    where: str | None = None
    """Take only records for which this holds, such as `is_safe == false and severity > 1`. Columns stand by name, or
    as `row["a name"]`; the others are counted, not set aside."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many records of each file, before `where`."""

    @field_validator("prompt", "answer")
    @classmethod
    def _braces_hold_columns(cls, text: str) -> str:
        try:
            fields = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise ValueError(f"is neither a column nor a text with columns in braces: {error}") from None
        if not all(fields):
            raise ValueError("has empty braces; name a column in them")
        return text

    @field_validator("where")
    @classmethod
    def _is_expression(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                ast.parse(text.strip(), mode="eval")
            except SyntaxError as error:
                raise ValueError(f"is not an expression ({error.msg}); write such as: is_safe == false") from None
        return text


class Files(Rows):
    """Files with one record a line or row, on this machine or in an object store."""

    type: Literal["files"]
    path: str | list[str]
    """File, glob or list of them; `s3://` and `gs://` too. JSON lines, JSON, CSV or Parquet, told by the suffix;
    `.gz` may follow. A JSON array is read whole; lines are streamed."""
    format: Literal["auto", "json", "csv", "parquet", "lines"] = "auto"
    """What the suffix does not tell. `lines` makes a record of each line, its column is `text`."""


class HuggingFace(Rows):
    """A data set in Hugging Face's form."""

    type: Literal["huggingface"]
    path: str
    """Hub id, or a folder written by `datasets.save_to_disk`."""
    subset: str | None = None
    """The hub's configuration name, such as `forget10`."""
    data_dir: str | None = None
    """The hub's folder to read, such as `harmless-base`."""
    split: str = "train"
    revision: str | None = None
    local: str | None = None
    """Where the same records lie under `data.folder`; taken instead of the hub when `data.folder` is given."""


class Text(Section):
    """Plain text, cut into windows of tokens: the model goes on from a prefix, without template or EOS."""

    type: Literal["text"]
    path: str | list[str]
    """File, glob or list of them; `s3://` and `gs://` too. `.gz` may follow."""
    prefix_tokens: int = Field(64, ge=1)
    """Tokens that a window begins with, as the prompt."""
    continuation_tokens: int = Field(64, ge=1)
    """Tokens that follow, as the answer."""
    overlap: int = Field(0, ge=0)
    """Tokens that a window shares with the next."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many lines of each file."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> "Text":
        if self.overlap >= self.prefix_tokens + self.continuation_tokens:
            raise ValueError("overlap must be smaller than prefix_tokens + continuation_tokens")
        return self


class People(Rows):
    """The made-up benchmark: fictional people whose facts no other text holds (see `components/data/people.py`)."""

    type: Literal["people"]
    split: Literal["forget", "normal", "holdout", "general"]
    people: int = Field(120, ge=4)
    """How many people there are, those to forget and the holdout included."""
    forget_people: int = Field(12, ge=1)
    holdout_people: int = Field(12, ge=1)
    seed: int = 0


class FixedAnswers(Section):
    """Answers written in the recipe, to steer towards."""

    type: Literal["fixed"]
    texts: list[str] = Field(min_length=1)
    """Such as `I can't help with that.`"""


Source = Annotated[Files | HuggingFace | Text | People, Field(discriminator="type")]
PoolSource = Annotated[Files | HuggingFace | Text | People | FixedAnswers, Field(discriminator="type")]


class Data(Section):
    """The three sets and how their text becomes tokens."""

    forget: list[Source] = []
    """What the model must forget: prompts and the answers to unlearn."""
    normal: list[Source] = []
    """Behaviour to keep."""
    random: list[PoolSource] = []
    """Pool of unrelated answers; only the answers are used. Another set's answers: name the same sources again."""
    folder: str | None = None
    """Where relative paths of files start, those of evaluation sets too; applied when the recipe is loaded."""
    template: str | None = Field(None, pattern=r"\{prompt\}")
    """How a prompt is written, such as `"Question: {prompt}\nAnswer:"`. The answer follows after `answer_prefix` and
    ends with EOS. Left out, it is the tokenizer's chat template, or the one shown here where there is none."""
    answer_prefix: str = " "
    """What stands between a prompt by `template` and its answer; counted as answer."""
    system: str | None = None
    """System message in front of every prompt."""
    chat_variables: dict[str, str | bool | int] = {}
    """Further variables of the chat template, such as `date_string` or `enable_thinking`."""
    max_tokens: int = Field(256, ge=8)
    """Longest prompt with answer."""
    on_long: Literal["quarantine", "truncate"] = "quarantine"
    """Longer rows are set aside, or their answer loses its end (and with it its EOS)."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of a set's rows is unusable."""
    overlap: Literal["error", "drop_from_normal", "keep"] = "error"
    """What to do with rows that stand in forget and in normal, letter case and spaces aside."""
    cache: bool = True
    """Keep the three sets' prepared rows for later runs. Without it, they lie in the run's folder while it runs, and
    of the normal set only the first rows are read, as many as the run uses."""


# --- models ----------------------------------------------------------------------------------------------------------


class Pretrained(Section):
    """A model that exists."""

    type: Literal["pretrained"]
    path: str
    """Local folder or hub id."""
    revision: str | None = None


class Scratch(Section):
    """A small Llama with random weights and a byte-level BPE tokenizer trained on the recipe's own text."""

    type: Literal["scratch"]
    vocabulary: int = Field(1024, ge=300)
    hidden_size: int = Field(160, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    context: int = Field(256, ge=16)
    """Longest input in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Scratch":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x heads = {2 * self.heads}")
        return self


Base = Annotated[Pretrained | Scratch, Field(discriminator="type")]


# --- objective -------------------------------------------------------------------------------------------------------


class GradientAscent(Section):
    """Lower the probability of the forget answers."""

    type: Literal["gradient_ascent"]
    weight: float = Field(0.1, ge=0)
    """ε1 of Yao et al."""


class BoundedAscent(Section):
    """Gradient ascent that lets go of a token whose loss has reached a bound."""

    type: Literal["bounded_ascent"]
    weight: float = Field(0.1, ge=0)
    bound: float = Field(gt=0)
    """Loss of a token, in nats, from which on it is left alone."""


class Npo(Section):
    """Negative preference optimization (arXiv 2404.05868)."""

    type: Literal["npo"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(0.1, gt=0)
    """How soon forgetting slows down as the answer becomes less likely than to the original; 0 would be ascent."""


class SimNpo(Section):
    """NPO without the original, by the mean log-probability of an answer (arXiv 2410.07163)."""

    type: Literal["simnpo"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(4.5, gt=0)
    margin: float = 0.0
    """γ of the paper, outside the factor β."""


class Wga(Section):
    """Gradient ascent weighted by the token's own probability (arXiv 2502.19301)."""

    type: Literal["wga"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(1.0, ge=0)
    """Power of the probability; 0 is gradient ascent."""


class SatImp(Section):
    """Gradient ascent weighted by saturation and importance (arXiv 2505.11953)."""

    type: Literal["satimp"]
    weight: float = Field(1.0, ge=0)
    beta1: float = Field(5.0, ge=0)
    """Power of the token's probability p."""
    beta2: float = Field(1.0, ge=0)
    """Power of 1 - p."""


class CeU(Section):
    """Cross-entropy to the model's own distribution without the answer's token (arXiv 2503.01224)."""

    type: Literal["ce_u"]
    weight: float = Field(1.0, ge=0)


class Undial(Section):
    """Self-distillation from the original's logits, lowered at the answer's token (arXiv 2402.10052)."""

    type: Literal["undial"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(10.0, ge=0)
    """By how much the logit is lowered."""


ForgetTerm = Annotated[
    GradientAscent | BoundedAscent | Npo | SimNpo | Wga | SatImp | CeU | Undial, Field(discriminator="type")
]


class RandomResponse(Section):
    """Answer forget prompts with unrelated text."""

    type: Literal["random_response"]
    weight: float = Field(1.0, ge=0)
    """ε2 of Yao et al."""
    responses: int = Field(1, ge=1)
    """K, the random responses drawn for each forget prompt and epoch."""


class KlToOriginal(Section):
    """Keep the original model's distributions on normal answers."""

    type: Literal["kl_to_original"]
    weight: float = Field(1.0, ge=0)
    """ε3 of Yao et al."""


class Nll(Section):
    """Next-token loss on normal answers."""

    type: Literal["nll"]
    weight: float = Field(1.0, ge=0)


class ReverseKl(Section):
    """KL(current ‖ original) on normal answers."""

    type: Literal["reverse_kl"]
    weight: float = Field(1.0, ge=0)


class JensenShannon(Section):
    """Jensen-Shannon divergence between original and current on normal answers."""

    type: Literal["jensen_shannon"]
    weight: float = Field(1.0, ge=0)


NormalTerm = Annotated[KlToOriginal | Nll | ReverseKl | JensenShannon, Field(discriminator="type")]


class Objective(Section):
    """ε1·forget + ε2·random + ε3·normal; a term left out is not computed and its rows are not read."""

    forget: ForgetTerm | None = None
    random: RandomResponse | None = None
    normal: NormalTerm | None = None


# --- optimizers ------------------------------------------------------------------------------------------------------


Beta = Annotated[float, Field(ge=0, lt=1)]


class Soul(Section):
    """SOUL: Sophia's clipped step with a Gauss-Newton-Bartlett diagonal Hessian (arXiv 2404.18239, 2305.14342)."""

    type: Literal["soul"]
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.965, 0.99)
    gamma: float = Field(0.04, gt=0)
    """ρ of Sophia: scales the Hessian against the momentum; larger means fewer clipped coordinates."""
    eps: float = Field(1e-12, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    hessian_interval: int = Field(10, ge=1)
    """k, steps between two refreshes of the Hessian; the first comes before step 1."""
    curvature_of: Literal["normal", "forget", "all"] = "normal"
    """Rows on which the Hessian is estimated; normal means the curvature of what is to be kept."""


class AdamW(Section):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    type: Literal["adamw"]
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


Optimizer = Annotated[Soul | AdamW, Field(discriminator="type")]


# --- training --------------------------------------------------------------------------------------------------------


class Train(Section):
    """Workers, precision, batches and length of training."""

    workers: int = Field(2, ge=0)
    """Ray Train workers; 0 runs the same loop in this process."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights (ZeRO stage 1 to 3)."""
    batch_size: int = Field(16, ge=1)
    """Rows of the pacing set per optimizer step, over all workers."""
    micro_batch_size: int = Field(8, ge=1)
    """Rows of the pacing set per worker in one forward pass; the rest is accumulated."""
    packing: bool = False
    """Put several sequences into one row of a forward pass instead of padding each to the longest."""
    epochs: int = Field(5, ge=1)
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; takes the place of epochs when given."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; linear and cosine end at 0."""
    log_every: int = Field(1, ge=1)
    """Steps between two progress lines; metrics.jsonl and MLflow get every step."""

    @model_validator(mode="after")
    def _bf16_needs_masters(self) -> "Train":
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError("dtype bf16 needs zero_stage 1, 2 or 3, which keep the fp32 master weights")
        return self


class Finetune(Section):
    """How to make the models that unlearning starts from and is compared with, when no path is given for them."""

    base: Base
    optimizer: Optimizer = AdamW(type="adamw", lr=1e-3)
    train: Train = Train()


class Models(Section):
    """Models that exist already."""

    original: Pretrained | None = None
    """The model that knows the forget set; left out, `finetune` makes it from forget + normal."""
    retain_only: Pretrained | None = None
    """A model that never saw the forget set; left out, `finetune` makes it from normal."""


# --- evaluation, tracking, gates -------------------------------------------------------------------------------------


class EvaluationSet(Section):
    """Questions of one kind."""

    rows: list[Source] = Field(min_length=1)
    normalised: bool = False
    """Probability of the answer against the wrong answers (TOFU's real authors and world facts)."""

    @model_validator(mode="after")
    def _wrong_answers_fit(self) -> "EvaluationSet":
        having = [not isinstance(source, Text) and source.perturbed_answer is not None for source in self.rows]
        if any(having) != all(having):
            raise ValueError("some of the set's sources name a perturbed_answer and some do not; give all or none")
        if self.normalised and not all(having):
            raise ValueError("normalised needs wrong answers: name the column perturbed_answer")
        return self


class Evaluation(Section):
    """What is measured before and after."""

    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], EvaluationSet] = {}
    """Named question sets; `forget` gives forget_quality, those in `utility` give model_utility."""
    utility: list[str] = []
    max_new_tokens: int = Field(48, ge=1)
    batch_size: int = Field(32, ge=1)
    """Questions per forward pass."""

    @model_validator(mode="after")
    def _utility_sets_exist(self) -> "Evaluation":
        missing = [name for name in self.utility if name not in self.sets]
        if missing:
            raise ValueError(f"utility names {missing}, which are not among the sets {sorted(self.sets)}")
        return self


class Gate(Section):
    """One condition for becoming champion; exactly one bound."""

    metric: str
    min: float | None = None
    max: float | None = None
    min_of_original: float | None = None
    """At least this fraction of the original model's value."""

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if sum(bound is not None for bound in (self.min, self.max, self.min_of_original)) != 1:
            raise ValueError(f"gate on {self.metric} needs exactly one of min, max, min_of_original")
        return self


class Tracking(Section):
    """Where MLflow records the run."""

    uri: str | None = None
    """MLflow tracking URI; left out, `sqlite:///<storage>/mlflow.db`."""
    experiment: str = "unlearning"
    registered_model: str | None = None
    """Name in the model registry; left out, the recipe's name."""


class Recipe(Section):
    """A whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Short name of model and data; part of the run's name."""
    storage: str = "runs"
    """Folder for prepared data, models, runs and MLflow's files; on a cluster, one that every node sees."""
    seed: int = Field(0, ge=0)
    if_exists: Literal["resume", "new", "fail"] = "resume"
    """A finished run of the same name is shown again (resume), run anew beside it (new), or refused (fail)."""
    data: Data
    models: Models = Models()
    finetune: Finetune | None = None
    objective: Objective = Objective(
        forget=GradientAscent(type="gradient_ascent"),
        random=RandomResponse(type="random_response"),
        normal=KlToOriginal(type="kl_to_original"),
    )
    optimizer: Optimizer = Soul(type="soul")
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    gates: list[Gate] = []

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        problems = []
        for term in ("forget", "normal", "random"):
            if getattr(self.objective, term) and not getattr(self.data, term):
                problems.append(f"objective.{term} needs rows: give data.{term}, or set objective.{term}=null")
        if not self.objective.forget and not self.objective.random:
            problems.append("objective has neither a forget nor a random term, so nothing would be unlearned")
        if self.objective.random and not self.data.forget:
            problems.append("objective.random puts its responses on forget prompts: give data.forget")
        if not self.models.original and not self.finetune:
            problems.append("no original model: give models.original, or finetune to make one")
        if isinstance(self.optimizer, Soul) and self.optimizer.curvature_of == "normal" and not self.objective.normal:
            problems.append("optimizer.curvature_of=normal needs objective.normal; choose forget or all")
        tuning = self.finetune.optimizer if self.finetune else None
        if isinstance(tuning, Soul) and tuning.curvature_of == "forget":
            problems.append("finetune.optimizer.curvature_of=forget: fine-tuning has normal rows only")
        if problems:
            raise ValueError("; ".join(problems))
        return self


# Settings that say where or how visibly a job runs, but cannot change its result.
_NOT_PART_OF_THE_RESULT: Any = {"storage": True, "if_exists": True, "tracking": True, "train": {"log_every"}}


def digest(value: object, length: int = 12) -> str:
    """First hex digits of the sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def config_hash(recipe: Recipe) -> str:
    """Eight hex digits that change whenever a setting that can change the result does.

    Settings only: what lies at the paths they name is compared when a finished run is met again.
    """
    return digest(recipe.model_dump(mode="json", exclude=_NOT_PART_OF_THE_RESULT), 8)


def registered_name(recipe: Recipe) -> str:
    """The model's name in the registry."""
    return recipe.tracking.registered_model or recipe.name


def run_name(recipe: Recipe) -> str:
    """`<objective>-<optimizer>-<model and data>-<hash>`: the same command names the same run."""
    objective = "+".join(term.type for _, term in recipe.objective if term).replace("_", "-")
    return f"{objective}-{recipe.optimizer.type}-{recipe.name}-{config_hash(recipe)}"
