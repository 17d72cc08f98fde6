"""A whole job, and the names that follow from it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from components.config.data import Data
from components.config.evaluation import Evaluation, Gate, Tracking
from components.config.objective import GradientAscent, KlToOriginal, Objective, RandomResponse
from components.config.section import Section, digest
from components.config.training import Finetune, Models, Optimizer, Soul, Train


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
