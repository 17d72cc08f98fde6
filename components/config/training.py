"""Models, optimizers, batches and length of training."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from components.config.faults import Best, Probe
from components.config.section import Place, Section


class Pretrained(Section):
    """A model that exists."""

    type: Literal["pretrained"]
    path: Place
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


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdaptiveInterval(Section):
    """Refresh the Hessian before its time when the fraction of clipped coordinates leaves a band."""

    low: float = Field(0.05, ge=0, le=1)
    high: float = Field(0.6, ge=0, le=1)
    soonest: int = Field(2, ge=1)
    """Fewest steps between two refreshes."""

    @model_validator(mode="after")
    def _is_band(self) -> "AdaptiveInterval":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


SOUL_RELEASE: dict[str, Any] = {
    "betas": (0.9, 0.95), "gamma": 0.04, "eps": 1e-15, "curvature": "squared_gradient", "curvature_of": "all",
    "batch_factor": 5120.0, "hessian_interval": 1, "adaptive": None,
}  # fmt: skip
"""What `preset: soul-release` sets."""


class Soul(Section):
    """SOUL: Sophia's clipped, Hessian-preconditioned step (arXiv 2404.18239, 2305.14342)."""

    type: Literal["soul"]
    preset: Literal["soul-release"] | None = None
    """soul-release: the arithmetic of the published code, to compare with: momentum applied twice, the squared
    gradient of the objective in place of the Hessian at every step, times 5120. It sets betas, gamma, eps and all that
    has to do with curvature, whatever else is given; lr and weight_decay stay."""
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.965, 0.99)
    gamma: float = Field(0.04, gt=0)
    """ρ of Sophia: scales the Hessian against the momentum; larger means fewer clipped coordinates."""
    eps: float = Field(1e-12, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    curvature: Literal["gnb", "squared_gradient", "hutchinson"] = "gnb"
    """Estimate of the Hessian's diagonal. gnb: Gauss-Newton-Bartlett, of the loss on labels that the model draws;
    squared_gradient: of the objective (empirical Fisher); hutchinson: u ⊙ Hu of the objective, ZeRO 0 to 2 only."""
    curvature_of: Literal["normal", "forget", "all"] = "normal"
    """Rows on which it is estimated; normal means the curvature of what is to be kept. squared_gradient of all rows
    costs no pass of its own."""
    batch_factor: float | None = Field(None, gt=0)
    """B, by which a squared gradient is multiplied; left out, the number of answer tokens behind it."""
    hessian_interval: int = Field(10, ge=1)
    """k, steps between two refreshes of the Hessian; the first comes before step 1."""
    adaptive: AdaptiveInterval | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "soul-release":
            return {**given, **SOUL_RELEASE}
        return given


class Influence(Section):
    """One-shot influence unlearning: a single step θ − η·g/(h + damping), that which SOUL iterates (arXiv 2404.18239).

    g is the objective's gradient and h the Gauss-Newton-Bartlett diagonal, both averaged over the run's steps with
    the parameters where they are; the last step moves them.
    """

    type: Literal["influence"]
    lr: float = Field(1.0, gt=0)
    damping: float = Field(1.0, gt=0)
    curvature_of: Literal["normal", "forget", "all"] = "normal"


class AdamW(Section):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    type: Literal["adamw"]
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class Sgd(Section):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"]
    lr: float = Field(1e-2, gt=0)
    momentum: Beta = 0.9
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Lion(Section):
    """Sign of a momentum with two averages (arXiv 2302.06675)."""

    type: Literal["lion"]
    lr: float = Field(3e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)


class Adafactor(Section):
    """Adam's second moment factored into rows and columns (arXiv 1804.04235): ZeRO stage 0 only."""

    type: Literal["adafactor"]
    lr: float = Field(1e-2, gt=0)
    weight_decay: float = Field(0.0, ge=0)


Optimizer = Annotated[Soul | AdamW | Sgd | Lion | Adafactor | Influence, Field(discriminator="type")]


class Lora(Section):
    """Train low-rank adapters (arXiv 2106.09685) and merge them into the model at the end."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, gt=0)
    targets: str | list[str] = "all-linear"
    """Names of the layers that get one, such as [q_proj, v_proj], or all-linear: every matrix of the blocks, experts
    and routers included."""
    export_adapter: bool = False
    """Write the adapter by itself too, into the folder `model-adapter` beside the model."""


class Wagle(Section):
    """Move only weights that matter for forgetting and not for keeping (WAGLE, arXiv 2410.17509)."""

    type: Literal["wagle"]
    keep: float = Field(0.95, gt=0, le=1)
    """Largest share of the weights that may move: those with the largest scores |(θ − ∇L_normal/γ) ⊙ ∇L_forget|. A
    score of 0 (embeddings of tokens that do not occur) never does."""
    gamma: float = Field(1e-6, gt=0)
    """γ, curvature of the retain loss (the release's value); the smaller, the more the retain gradient counts against
    the weight's size."""
    batches: int = Field(8, ge=1)
    """Batches over which the two gradients are averaged, at the original model."""


class Train(Section):
    """Workers, precision, batches and length of training."""

    workers: int = Field(2, ge=0)
    """Ray Train workers; 0 runs the same loop in this process."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in the CPU's memory: the optimizer's state (stage 1 to 3), or parameters too (3)."""
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
    trainable: str | list[str] | None = None
    """Train only parameters in whose name one of these regular expressions is found, such as
    `layers\\.(5|6|7)\\..*down_proj`."""
    lora: Lora | None = None
    gradient_cosine_every: int | None = Field(None, ge=1)
    """Measure the angle between the forget and the normal term's gradient every so many steps, at the cost of a pass
    for each."""
    checkpoint_every: int | None = Field(100, ge=1)
    """Steps between two checkpoints, from which the same command goes on after a stop; null: only when it is stopped
    by Ctrl-C, SIGTERM, `ray job stop` or a node that is about to go."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest are kept."""
    checkpoint_best: Best | None = None
    checkpoint_storage: Place | None = None
    """Where checkpoints lie, such as s3://bucket/checkpoints; left out, in the run's folder."""
    max_failures: int = Field(3, ge=0)
    """How often dead workers are replaced, each time from the newest checkpoint or from the start."""
    max_bad_steps: int = Field(0, ge=0)
    """Steps whose loss or gradient is not finite that may be left out, no parameter being changed, before training
    ends with an error."""
    stop_collapsed: int | None = Field(3, ge=1)
    """Steps in a row after which unlearning stops when the model answers the normal rows worse than by guessing: a loss
    above ln(vocabulary) nats per token. null: never; the report says that the model collapsed in either case."""
    timeout: float = Field(600, gt=0)
    """Seconds that a worker waits for the others in one exchange before it takes them for dead."""
    probe: Probe | None = None
    log_every: int = Field(1, ge=1)
    """Steps between two progress lines; metrics.jsonl and MLflow get every step."""

    @model_validator(mode="after")
    def _bf16_needs_masters(self) -> "Train":
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError("dtype bf16 needs zero_stage 1, 2 or 3, which keep the fp32 master weights")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload=parameters needs zero_stage 3")
        if self.lora and self.trainable:
            raise ValueError("lora trains its adapters only: leave trainable out, and name layers in lora.targets")
        if self.checkpoint_best and not self.checkpoint_every:
            raise ValueError("checkpoint_best chooses among checkpoints: give checkpoint_every")
        if self.checkpoint_storage and not re.match(r"(s3|gs)://.|[^:]+$", self.checkpoint_storage):
            raise ValueError("checkpoint_storage must be a path, s3:// or gs://")
        return self

    @field_validator("trainable")
    @classmethod
    def _are_expressions(cls, given: Any) -> Any:
        for pattern in [given] if isinstance(given, str) else given or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return given


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
