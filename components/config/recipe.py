"""A whole job, and the names that follow from it."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from components.config.attacks import Attacks
from components.config.data import Data
from components.config.evaluation import Evaluation
from components.config.faults import Guard
from components.config.objective import (
    Balanced,
    Dual,
    GradientAscent,
    KlAscent,
    KlToOriginal,
    Nll,
    Objective,
    RandomResponse,
)
from components.config.section import LONGEST_NAME, Place, Section, digest
from components.config.tracking import Gate, Tracking
from components.config.training import Adafactor, Finetune, Influence, Models, Optimizer, Soul, Train, Wagle


class Recipe(Section):
    """A whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Short name of model and data; part of the run's name."""
    storage: Place = "runs"
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
    mask: Wagle | None = None
    """Which weights may move; left out, all."""
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    attacks: Attacks = Attacks()
    guards: list[Guard] = []
    gates: list[Gate] = []

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        problems = [*_name_problems(self), *_objective_problems(self), *_pair_problems("", self.optimizer, self.train)]
        for term in ("forget", "normal", "random"):
            if getattr(self.objective, term) and not getattr(self.data, term):
                problems.append(f"objective.{term} needs rows: give data.{term}, or set objective.{term}=null")
        if self.objective.random and not self.data.forget:
            problems.append("objective.random puts its responses on forget prompts: give data.forget")
        if not self.models.original and not self.finetune:
            problems.append("no original model: give models.original, or finetune to make one")
        if isinstance(self.optimizer, Soul | Influence):
            source = self.optimizer.curvature_of
            if source != "all" and not getattr(self.objective, source):
                problems.append(f"optimizer.curvature_of={source} needs objective.{source}; choose another or all")
        if self.mask and not (self.objective.forget and self.objective.normal):
            problems.append(
                "mask weighs the forget against the normal rows: give objective.forget and objective.normal"
            )
        problems += _guard_problems(self)
        if self.finetune:
            problems += _pair_problems("finetune.", self.finetune.optimizer, self.finetune.train)
            if getattr(self.finetune.optimizer, "curvature_of", None) == "forget":
                problems.append("finetune.optimizer.curvature_of=forget: fine-tuning has normal rows only")
            if isinstance(self.finetune.optimizer, Influence):
                problems.append("finetune.optimizer=influence is a method to forget; it cannot teach")
        if problems:
            raise ValueError("; ".join(problems))
        return self


_LONGEST_MODEL = 200
"""Characters of a registered model's name: MLflow stores 256, and names such as `<name>-candidates` follow from it."""


def _name_problems(recipe: Recipe) -> Iterator[str]:
    """Names that are made of the recipe's and would be refused when they are used, hours later."""
    room = LONGEST_NAME - _FOLLOWS - len(_run_name(recipe, "")) - _HASH + len(recipe.name)
    if len(recipe.name) > room:
        yield (
            f"name has {len(recipe.name)} characters, which makes the run's folder name "
            f"({_run_name(recipe, '')[:60]}…) too long for a file system; choose one of at most {room}"
        )
    elif len(registered_name(recipe)) > _LONGEST_MODEL:
        yield (
            f"the registered model's name has {len(registered_name(recipe))} characters; expected at most "
            f"{_LONGEST_MODEL}: set tracking.registered_model"
        )


def _objective_problems(recipe: Recipe) -> Iterator[str]:
    objective, data = recipe.objective, recipe.data
    if not objective.forget and not objective.random:
        yield "objective has neither a forget nor a random term, so nothing would be unlearned"
    if objective.prefers_responses and not data.random:
        yield f"objective.forget={objective.forget.type} prefers the answers of data.random: give it, such as refusals"  # type: ignore[union-attr]
    if data.responses == "by_row" and objective.responses > 1:
        yield "data.responses=by_row gives one response a row: set objective.random.responses=1"
    if isinstance(objective.forget, Nll) != (objective.negate is not None):
        yield (
            "objective.forget=nll learns the forget answers, which objective.negate then subtracts: give both "
            "(task-vector negation) or neither"
        )
    if objective.negate is not None and (objective.random or objective.normal):
        yield "objective.negate subtracts all that is learnt: set objective.random=null and objective.normal=null"
    if objective.negate is not None and recipe.train.lora and recipe.train.lora.export_adapter:
        yield "train.lora.export_adapter would write what objective.negate subtracts: set it to false"
    layers = {term.layer for term in objective.terms().values() if getattr(term, "layer", None) is not None}
    if len(layers) > 1:
        yield f"the objective's terms take the activations of several layers {sorted(layers)}; expected one"
    for group, term in objective.terms().items():
        if isinstance(term.weight, Balanced) and (group == "forget" or not objective.forget):
            yield f"objective.{group}.weight=balanced is measured against the forget term's; give it to another term"
        if isinstance(term.weight, Dual) and group == "forget":
            yield "objective.forget.weight=dual: a constraint is on what is to be kept; give it to another term"
    if recipe.train.gradient_cosine_every and not (objective.forget and objective.normal):
        yield "train.gradient_cosine_every needs objective.forget and objective.normal"
    if recipe.mask and recipe.train.lora:
        yield "mask chooses among the model's weights, and train.lora trains none of them: leave one out"
    if recipe.mask and isinstance(objective.forget, KlAscent):
        yield "mask needs a gradient at the original, where that of kl_ascent is 0: take another objective.forget"


def _guard_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.guards and not recipe.train.checkpoint_every:
        yield "guards go back to a checkpoint: give train.checkpoint_every"
    guarded = [guard.metric for guard in recipe.guards]
    yield from _watched_problems("", recipe.train, [*recipe.objective.terms()], guarded)
    if recipe.finetune:
        yield from _watched_problems("finetune.", recipe.finetune.train, ["normal"], [])


def _watched_problems(where: str, train: Train, terms: list[str], watched: list[str]) -> Iterator[str]:
    """Metrics that something depends on and no step measures."""
    own = ["loss", "grad_norm", "clip_fraction", "gradient_cosine", *terms]
    for metric in [*watched, *([train.checkpoint_best.metric] if train.checkpoint_best else [])]:
        kind, _, name = metric.partition("/")
        probed = kind == "probe" and name in [f"{term}_probability" for term in terms if term != "random"]
        if probed and not train.probe:
            yield f"{metric} is measured with {where}train.probe only: give it, such as {where}train.probe.every=10"
        elif not probed and (kind != "train" or not name.startswith(tuple(own))):
            yield f"{metric} is never measured; expected probe/normal_probability, train/loss, train/normal_loss, …"


def _pair_problems(where: str, optimizer: Any, train: Train) -> Iterator[str]:
    """Combinations of optimizer and training that cannot work."""
    if isinstance(optimizer, Adafactor) and train.zero_stage:
        yield (
            f"{where}optimizer=adafactor factors matrices, but ZeRO {train.zero_stage} hands it flat pieces of them; "
            f"set {where}train.zero_stage=0"
        )
    if isinstance(optimizer, Soul) and optimizer.curvature == "hutchinson" and train.zero_stage == 3:
        yield (
            f"{where}optimizer.curvature=hutchinson differentiates twice, which ZeRO 3 cannot: its layers are gone by "
            f"then; set {where}train.zero_stage=2, or choose gnb"
        )
    if isinstance(optimizer, Soul) and optimizer.curvature == "hutchinson" and optimizer.batch_factor:
        yield f"{where}optimizer.batch_factor multiplies squared gradients, which hutchinson has none of: leave it out"
    if isinstance(optimizer, Soul) and optimizer.adaptive and optimizer.adaptive.soonest >= optimizer.hessian_interval:
        yield f"{where}optimizer.adaptive.soonest must be below hessian_interval={optimizer.hessian_interval}"
    if isinstance(optimizer, Influence) and train.gradient_clipping:
        yield f"{where}optimizer=influence needs the gradient's true size; set {where}train.gradient_clipping=0"
    if isinstance(optimizer, Influence) and train.max_bad_steps:
        yield f"{where}optimizer=influence moves by all its steps together: set {where}train.max_bad_steps=0"
    if isinstance(optimizer, Influence) and (train.warmup_steps or train.schedule != "constant"):
        yield f"{where}optimizer=influence moves once: give neither warm-up nor a schedule"


# Settings that say where, how visibly or how safely a job runs, or how its work is split: the result is the same, up to
# the order of sums.
NOT_PART_OF_TRAINING = {
    "log_every", "checkpoint_every", "keep_checkpoints", "checkpoint_storage", "max_failures", "max_bad_steps",
    "timeout", "workers", "cpus_per_worker", "gpus_per_worker", "zero_stage", "offload", "micro_batch_size", "packing",
}  # fmt: skip
_NOT_PART_OF_THE_RESULT: Any = {
    "storage": True, "if_exists": True, "tracking": True, "attacks": True, "train": NOT_PART_OF_TRAINING,
    "finetune": {"train": NOT_PART_OF_TRAINING},
}  # fmt: skip


_HASH = 8  # hex digits
_FOLLOWS = 30  # bytes that a folder's name leaves to what is appended to it: attempts, ids, temporary names


def config_hash(recipe: Recipe) -> str:
    """Eight hex digits that change whenever a setting that can change the result does.

    Settings only: what lies at the paths they name is compared when a finished run is met again.
    """
    settings = recipe.model_dump(mode="json", exclude=_NOT_PART_OF_THE_RESULT)
    if recipe.guards or recipe.train.checkpoint_best:  # then checkpoints are what the model is chosen from
        settings["train"]["checkpoint_every"] = recipe.train.checkpoint_every
    return digest(settings, _HASH)


def registered_name(recipe: Recipe) -> str:
    """The model's name in the registry."""
    return recipe.tracking.registered_model or recipe.name


def objective_name(recipe: Recipe) -> str:
    """Its terms, such as `gradient_ascent+kl_to_original`."""
    return "+".join(term.type for term in recipe.objective.terms().values())


def run_name(recipe: Recipe) -> str:
    """`<objective>-<optimizer>-<model and data>-<hash>`: the same command names the same run."""
    return _run_name(recipe, config_hash(recipe))


def _run_name(recipe: Recipe, end: str) -> str:
    objective = objective_name(recipe).replace("_", "-")
    return f"{objective}-{recipe.optimizer.type}-{recipe.name}-{end}"
