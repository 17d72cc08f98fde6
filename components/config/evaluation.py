"""What is measured, where it is recorded, and what a champion must reach."""

from typing import Annotated

from pydantic import Field, model_validator

from components.config.data import Source, Text
from components.config.section import Section


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
    retain_log: str | None = None
    """Evaluation of a retain-only model as others publish it (open-unlearning's TOFU_EVAL.json, TOFU's
    eval_log_aggregated.json), for where there is no such model: forget_quality and privleak compare with it."""
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
