"""Models, optimizers, batches and length of training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.section import Section


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
