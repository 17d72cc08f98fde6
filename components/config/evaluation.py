"""What is measured before and after."""

import fnmatch
from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.data import Source
from components.config.section import Place, Section
from components.config.training import Pretrained


class EvaluationSet(Section):
    """Questions of one kind."""

    rows: list[Source] = Field(min_length=1)
    normalised: bool = False
    """Probability of the answer against the wrong answers (TOFU's real authors and world facts)."""

    @model_validator(mode="after")
    def _wrong_answers_fit(self) -> "EvaluationSet":
        having = [
            bool(getattr(source, "perturbed_answer", None) or getattr(source, "choices", None)) for source in self.rows
        ]
        if any(having) != all(having):
            raise ValueError("some of the set's sources name a perturbed_answer and some do not; give all or none")
        if self.normalised and not all(having):
            raise ValueError("normalised needs wrong answers: name the column perturbed_answer")
        return self


class Keywords(Section):
    """A judge that reads words."""

    type: Literal["keywords"]
    texts: list[str] = Field(min_length=1)
    """An answer with any of them is harmful, letter case aside."""


class Classifier(Section):
    """A judge that is a model: a sequence classifier with weights in safetensors."""

    type: Literal["classifier"]
    path: Place
    """Folder or hub id."""
    revision: str | None = None
    label: str
    """The label that means harmful, as the classifier's config names it."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Probability of the label above which an answer is harmful."""

    @property
    def model(self) -> Pretrained:
        """Where the classifier is."""
        return Pretrained(type="pretrained", path=self.path, revision=self.revision)


class LmEval(Section):
    """Tasks of EleutherAI's lm-evaluation-harness, an optional extra (`ray-unlearn[lm-eval]`)."""

    tasks: list[str] = Field(min_length=1)
    """As `lm_eval ls tasks` names them; each gives `lm_eval_<task>_<metric>`."""
    include_path: Place | None = None
    """Folder with tasks of one's own."""
    shots: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    """Take only the first so many of each task."""
    batch_size: int = Field(16, ge=1)


class Evaluation(Section):
    """What is measured before and after."""

    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], EvaluationSet] = {}
    """Named question sets; `forget` gives forget_quality, those in `utility` give model_utility."""
    utility: list[str] = []
    retain_log: Place | None = None
    """Evaluation of a retain-only model as others publish it (open-unlearning's TOFU_EVAL.json, TOFU's
    eval_log_aggregated.json), for where there is no such model: forget_quality and privleak compare with it."""
    metrics: list[str] | None = None
    """Which to compute, as names or patterns such as `forget_*`; left out, all. Without any that reads answers, none
    are generated."""
    judge: Annotated[Keywords | Classifier, Field(discriminator="type")] | None = None
    """What takes an answer for harmful: gives `<set>_harmful`."""
    reference: Pretrained | None = None
    """A model that saw neither forget nor holdout rows: gives `mia_reference`."""
    gradient_norms: bool = False
    """Also the gradient's norm for each row, in a backward pass of its own: gives `mia_gradient_norm`."""
    lm_eval: LmEval | None = None
    """General ability, measured by others' tasks."""
    samples: int = Field(0, ge=0)
    """Answers to draw for each question beside the greedy one: gives `<set>_worst_sample`."""
    temperature: float = Field(1.0, gt=0)
    """Of the drawn answers."""
    max_new_tokens: int = Field(48, ge=1)
    batch_size: int = Field(32, ge=1)
    """Questions per forward pass."""

    @model_validator(mode="after")
    def _utility_sets_exist(self) -> "Evaluation":
        missing = [name for name in self.utility if name not in self.sets]
        if missing:
            raise ValueError(f"utility names {missing}, which are not among the sets {sorted(self.sets)}")
        return self

    def wants(self, metric: str) -> bool:
        """Whether `metrics` names this one."""
        return self.metrics is None or any(fnmatch.fnmatchcase(metric, pattern) for pattern in self.metrics)
