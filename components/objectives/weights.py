"""Weights ε1, ε2, ε3 of the objective as functions of the step, and the few numbers that some of them learn.

What is learnt (the dual variable, the balance of gradient norms) is one dict from group to number, the same on every
rank: it is all that a checkpoint must keep of the weights.
"""

from typing import Any

from components.config import Balanced, Dual, Objective, Ramp

Learnt = dict[str, float]


def first_learnt(objective: Objective) -> Learnt:
    """What the adaptive weights start with."""
    terms = objective.terms()
    dual = {group: term.weight.start for group, term in terms.items() if isinstance(term.weight, Dual)}
    return dual | {group: 0.0 for group, term in terms.items() if isinstance(term.weight, Balanced)}


def weights_at(objective: Objective, step: int, steps: int, steps_per_epoch: int, learnt: Learnt) -> dict[str, float]:
    """The weight of each group's term in `step`, counted from 0."""
    epochs = max(1, -(-steps // steps_per_epoch))
    shares = {"epoch": (step // steps_per_epoch) / epochs, "step": step / steps}

    def weight(group: str, given: Any) -> float:
        if isinstance(given, Ramp):
            return given.start + (given.end - given.start) * shares[given.every]
        return learnt[group] if isinstance(given, Dual | Balanced) else given

    return {group: weight(group, term.weight) for group, term in objective.terms().items()}


def dual_step(objective: Objective, learnt: Learnt, losses: dict[str, float], epoch: int) -> Learnt:
    """λ ← max(0, λ + η·(L − ε)), once an optimizer step, from the step's global mean loss L of each group's term."""
    new = dict(learnt)
    for group, term in objective.terms().items():
        if isinstance(term.weight, Dual) and epoch >= term.weight.warmup_epochs:
            new[group] = max(0.0, learnt[group] + term.weight.rate * (losses[group] - term.weight.bound))
    return new


def balanced(objective: Objective, learnt: Learnt, weights: dict[str, float], norms: dict[str, float]) -> Learnt:
    """The weight that gives each balanced term its share, from the norms of the unweighted terms' gradients."""
    new = dict(learnt)
    for group, term in objective.terms().items():
        if isinstance(term.weight, Balanced):
            wanted = term.weight.ratio * weights["forget"] * norms["forget"]
            bound = term.weight.largest
            new[group] = min(bound, wanted / norms[group]) if norms[group] > 0 else bound
    return new


def balance_due(objective: Objective, step: int) -> tuple[str, ...]:
    """The groups whose gradients must be measured before `step`: none, or forget and those to be balanced."""
    due = [
        group
        for group, term in objective.terms().items()
        if isinstance(term.weight, Balanced) and step % term.weight.every == 0
    ]
    return ("forget", *due) if due else ()
