"""A tune space: which settings of a recipe are searched, how, and by what the trials are judged."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from components.config.section import Section

Pair = tuple[float, float]


class Searched(Section):
    """The values that a setting may take: exactly one of the distributions."""

    uniform: Pair | None = None
    loguniform: Pair | None = None
    quniform: tuple[float, float, float] | None = None
    """Low, high and the step between neighbours."""
    randint: tuple[int, int] | None = None
    """Both ends may come."""
    lograndint: tuple[int, int] | None = None
    """Both ends may come."""
    choice: list[Any] | None = Field(None, min_length=1)
    """Values, or whole sections such as {type: npo, beta: 0.1}."""
    grid: list[Any] | None = Field(None, min_length=1)
    """For `search: {type: grid}`, which tries all combinations."""
    when: dict[str, Any] = {}
    """Other settings and the value (or list of values) that each must have for this one to be searched."""

    @model_validator(mode="after")
    def _one_distribution(self) -> "Searched":
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}" + (f"; {given} are given" if given else ""))
        if self.kind in ("choice", "grid"):
            return self
        low, high, *step = self.values
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{self.kind} [{low:g}, {high:g}] is empty: the first number must be below the second")
        if self.kind.startswith("log") and low <= 0:
            raise ValueError(f"{self.kind} [{low:g}, {high:g}] touches 0: a logarithm needs numbers above it")
        if step and not 0 < step[0] <= high - low:
            raise ValueError(f"quniform's step {step[0]:g} must be above 0 and at most {high - low:g}")
        return self

    @property
    def kind(self) -> str:
        """Name of the distribution."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """What stands in the space file: ends, or all choices."""
        return list(getattr(self, self.kind))


KINDS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice", "grid")


class Goal(Section):
    """A number to make small or large: an expression of metrics, see `components/tuning/expressions.py`."""

    minimise: str | None = None
    maximise: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "Goal":
        if (self.minimise is None) == (self.maximise is None):
            raise ValueError("a goal needs either minimise or maximise")
        return self

    @property
    def expression(self) -> str:
        """What is computed."""
        return self.minimise or self.maximise or ""

    @property
    def sign(self) -> int:
        """1 where small is good, -1 where large is: sign × value is always to be made small."""
        return 1 if self.minimise is not None else -1


class Search(Section):
    """How the next trial's settings are chosen."""

    type: Literal["optuna", "random", "grid"] = "optuna"
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """Of Optuna: the tree-structured Parzen estimator, or a genetic algorithm for two goals."""
    trials: int = Field(12, ge=1)
    """How many; a grid has as many as it has points."""
    startup: int = Field(5, ge=1)
    """Trials drawn at random before Optuna's estimate begins; of nsga2, the size of a generation."""
    seed: int = Field(0, ge=0)
    """Of the search alone. One trial after the other, the same sweep gives the same trials."""


class Scheduler(Section):
    """Which trials are stopped before their end, by what `train.probe` measures."""

    type: Literal["none", "asha", "median"] = "none"
    maximise: str = "probe.normal_probability - probe.forget_probability"
    """What is compared at the same step: an expression of a step's metrics, as in metrics.jsonl, with . for /."""
    grace: int = Field(10, ge=1)
    """Steps that every trial may take."""
    reduction: float = Field(3.0, gt=1)
    """Of asha: one in so many goes on beyond each rung; rungs are at grace × reduction^i steps."""


class Space(Section):
    """A whole space file."""

    settings: dict[str, Any] = {}
    """Settings that all trials have, by dotted path, over those of the recipe."""
    space: dict[str, Searched] = Field(min_length=1)
    """Searched settings by dotted path, each after those that its `when` names."""
    constraints: list[str] = []
    """What must hold between settings, such as `optimizer.adaptive.soonest < optimizer.hessian_interval`; others are
    drawn where it does not."""
    goals: Annotated[list[Goal], Field(min_length=1, max_length=2)] = [
        Goal(minimise="abs(forget_truth_ratio - retain_only.forget_truth_ratio)")
    ]
    """What makes a trial good: one number, or two that are traded off."""
    subject_to: list[str] = ["model_utility >= 0.95 * original.model_utility"]
    """What a trial must reach to be the best, with <= or >=; the sampler is told by how much it is missed."""
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; left out, as many as the cluster holds."""
    keep: int = Field(3, ge=1)
    """Models that are kept: those of the best trials by Pareto rank."""

    @field_validator("settings", mode="before")
    @classmethod
    def _no_settings(cls, given: Any) -> Any:
        return given or {}

    @model_validator(mode="after")
    def _parts_fit(self) -> "Space":
        problems = []
        kinds = {path: searched.kind for path, searched in self.space.items()}
        if self.search.type == "grid":
            problems += [
                f"search.type=grid tries given values only, and {path} is {kind}: give it as grid: […], or search "
                "with optuna or random"
                for path, kind in kinds.items()
                if kind != "grid"
            ]
        else:
            problems += [
                f"{path} is a grid, which search.type={self.search.type} does not walk: write choice: […], or set "
                "search.type=grid and give grids only"
                for path, kind in kinds.items()
                if kind == "grid"
            ]
        if self.search.sampler == "nsga2" and len(self.goals) < 2:
            problems.append("search.sampler=nsga2 is for two goals; take tpe, or give a second goal")
        order = list(self.space)
        for place, (path, searched) in enumerate(self.space.items()):
            for other in searched.when:
                if other in order[place:]:
                    problems.append(f"{path} is searched when {other} has a value: name {other} before it")
            for other in order[:place]:
                if other.startswith(f"{path}."):
                    problems.append(f"{path} holds {other}, which is searched too: name {path} before it")
        problems += [
            f"{path} is searched and stands under settings too" for path in self.settings if path in self.space
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self
