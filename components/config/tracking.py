"""Where MLflow records runs and models, and what a champion must reach."""

from typing import Literal

from pydantic import Field, model_validator

from components.config.section import Section


class Gate(Section):
    """One condition for becoming champion; exactly one bound."""

    metric: str
    suite: str | None = None
    """Suite that measures it (`evaluate.py RECIPE suite=NAME`), or `attacks` (`attack.py RECIPE`); left out, the
    recipe's own evaluation."""
    min: float | None = None
    max: float | None = None
    min_ratio: float | None = Field(None, gt=0)
    """At least this fraction of the value that the model `of` has."""
    max_drop: float | None = Field(None, ge=0)
    """At most so much below that value."""
    max_rise: float | None = Field(None, ge=0)
    """At most so much above it."""
    max_distance: float | None = Field(None, ge=0)
    """At most so far from it, up or down."""
    of: Literal["original", "retain-only", "champion"] | None = None
    """The model to compare with. A gate `of: champion` holds as long as there is no champion."""
    confident: bool = False
    """The bound must hold for the worse end of the 95 % interval; of a difference, on the same rows."""

    @property
    def bound(self) -> tuple[str, float]:
        """Which bound it is, and its number."""
        return next((kind, number) for kind in _BOUNDS if (number := getattr(self, kind)) is not None)

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        given = [kind for kind in _BOUNDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"gate on {self.metric} needs exactly one of {', '.join(_BOUNDS)}")
        if (given[0] in ("min", "max")) != (self.of is None):
            raise ValueError(f"gate on {self.metric}: give `of` with {', '.join(_BOUNDS[2:])}, and only with them")
        return self


_BOUNDS = ("min", "max", "min_ratio", "max_drop", "max_rise", "max_distance")


class Tracking(Section):
    """Where MLflow records the run."""

    uri: str | None = None
    """MLflow tracking URI; left out, that of the environment (MLFLOW_TRACKING_URI), else `sqlite:///<storage>/mlflow.db`.
    Names and passwords belong into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "unlearning"
    registered_model: str | None = Field(None, pattern=r"^[^/:@%]+$")
    """Name in the model registry; left out, the recipe's name. Candidates are versions of `<name>-candidates`."""
    production: str | None = None
    """MLflow tracking URI of the registry that champions are promoted into; left out, the same as candidates'."""
