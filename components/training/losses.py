"""The objective on one micro-batch: what each term is given, and the weighted sum of the terms."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from components.config import Objective
from components.data.streams import draw
from components.objectives.terms import find_term, settings
from components.training.batches import MicroBatch
from components.training.engine import Outputs
from components.training.passes import Setup, Step
from components.training.reference import Reference


def combine(
    outputs: Outputs,
    batch: MicroBatch,
    objective: Objective,
    weights: Mapping[str, float],
    counts: Mapping[str, int],
    references: Mapping[str, Reference],
    direction: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ε1·L_fgt + ε2·L_rdn + ε3·L_nor of one micro-batch, each term over its global count.

    Only the groups that `weights` names are computed. Returns the loss to differentiate and what to log; both add up
    to the step's values over micro-batches and ranks.
    """
    loss = outputs.nothing()
    own = _by_group(outputs, batch)
    parts = {"loss": torch.zeros((), device=loss.device)}
    for group, config in objective.terms().items():
        if group not in weights:
            continue
        function, inputs, per = find_term(config)
        given = _Inputs(own, batch, group, references, direction)
        total, metrics = function(**{name: given.find(name) for name in inputs}, **settings(config))
        mean = total / counts[group if per == "token" else f"{group}_rows"]
        loss = loss + weights[group] * mean
        parts["loss"] = parts["loss"] + (weights[group] * mean).detach()
        parts[f"{group}_loss"] = mean.detach()
        parts |= {f"{group}_{name}": value / counts[group] for name, value in metrics.items()}
    return loss, parts


def combined(
    setup: Setup, step: Step, weights: Mapping[str, float], objective: Objective | None = None
) -> Callable[[Outputs, MicroBatch], tuple[Tensor, dict[str, Tensor]]]:
    """`combine` for the micro-batches of a step, of the job's objective or of another."""
    objective, references = objective or setup.job.objective, setup.batcher.references
    return lambda outputs, batch: combine(outputs, batch, objective, weights, step.counts, references, setup.direction)


def _by_group(outputs: Outputs, batch: MicroBatch) -> dict[str, Outputs]:
    """Each group's part of the outputs; split at once, so that the backward pass puts them together at once."""
    sizes = [len(answers.targets) for answers in batch.groups.values()]
    nothing = [None] * len(sizes)
    logits, states = (nothing if x is None else x.split(sizes) for x in outputs)
    return {group: Outputs(*both) for group, both in zip(batch.groups, zip(logits, states, strict=True), strict=True)}


def steering_direction(seed: int, size: int) -> Tensor:
    """[size] RMU's random unit vector, its elements drawn from [0, 1)."""
    vector = torch.from_numpy(draw(seed, "steering", 0).random(size))
    return (vector / vector.norm()).float()


class _Inputs:
    """What a term of `group` may ask for, by name; computed when asked."""

    def __init__(
        self,
        outputs: Mapping[str, Outputs],
        batch: MicroBatch,
        group: str,
        references: Mapping[str, Reference],
        direction: Tensor | None,
    ):
        self.outputs, self.batch, self.group = outputs, batch, group
        self.references, self.direction = references, direction

    def find(self, name: str) -> Tensor:
        if name.startswith("chosen_"):
            chosen = _Inputs(self.outputs, self.batch, "random", self.references, self.direction)
            return chosen.find(name.removeprefix("chosen_"))
        answers, outputs = self.batch.groups[self.group], self.outputs[self.group]
        if name in ("mask", "targets"):
            return getattr(answers, name)
        if name == "logits":
            assert outputs.logits is not None
            return outputs.logits
        if name == "states":
            assert outputs.states is not None
            return outputs.states
        if name == "logp":
            logits = self.find("logits").float()
            return answers.padded(-torch.nn.functional.cross_entropy(logits, answers.targets, reduction="none"))
        if name == "direction":
            assert self.direction is not None
            return self.direction
        if name == "original_logp":
            assert answers.original_logp is not None
            return answers.padded(answers.original_logp)
        assert answers.original is not None
        return answers.original if name == "original_states" else self.references[self.group].logits(answers.original)
