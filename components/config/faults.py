"""What is kept of a run while it trains, and when it must not go on."""

from typing import Literal

from pydantic import Field, model_validator

from components.config.section import Section


class Best(Section):
    """Of the checkpoints, the one to keep whatever comes later, and to write as the model at the end."""

    metric: str = Field(pattern=r"^\w+/\w+$")
    """One of metrics.jsonl, such as probe/normal_probability; a checkpoint without it is never the best. Those under
    train/ are measured on a step's batch, before its update."""
    mode: Literal["min", "max"]


class Guard(Section):
    """A bound on what must not break while the model forgets: once it is left, training ends.

    The model that is written is then the newest checkpoint that was seen within all bounds.
    """

    metric: str = Field(pattern=r"^\w+/\w+$")
    """One of metrics.jsonl, such as train/normal_loss or probe/normal_probability."""
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_bound(self) -> "Guard":
        if self.min is None and self.max is None:
            raise ValueError(f"guard on {self.metric} needs min, max or both")
        return self


class Probe(Section):
    """A quick look at what is kept and what forgotten, while training: probe/normal_probability and forget_probability.

    The mean over some rows of the set, always the same ones, of the probability of an answer, to the power of one over
    its tokens (TOFU's measure, arXiv 2401.06121).
    """

    every: int = Field(10, ge=1)
    """Steps between two."""
    rows: int = Field(32, ge=1)
