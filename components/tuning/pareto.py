"""Which trials are best: by goals, conditions and Pareto rank."""

from collections.abc import Sequence

from components.config.tuning import Goal, Space
from components.tuning import expressions
from components.tuning.trials import Trial


def axes(space: Space, trials: Sequence[Trial]) -> list[Goal]:
    """What is traded off: the two goals, or the goal and the utility."""
    utility = Goal(maximise="model_utility")
    if len(space.goals) == 1 and all("model_utility" in t.metrics for t in trials if t.state == "finished"):
        return [*space.goals, utility]
    return list(space.goals)


def points(space: Space, trials: Sequence[Trial]) -> dict[int, tuple[float, ...]]:
    """By the number of each finished trial, what is traded off, all to be made small."""
    found = {}
    extra = axes(space, trials)[len(space.goals) :]
    for trial in trials:
        if trial.state == "finished":
            others = (goal.sign * expressions.value(goal.expression, trial.metrics) for goal in extra)
            found[trial.number] = (*_turned(space, trial), *others)
    return found


def _turned(space: Space, trial: Trial) -> tuple[float, ...]:
    """What the goals are of a finished trial, all to be made small."""
    return tuple(goal.sign * value for goal, value in zip(space.goals, trial.values, strict=True))


def dominates(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Nowhere larger and somewhere smaller."""
    return all(a <= b for a, b in zip(ours, theirs, strict=True)) and tuple(ours) != tuple(theirs)


def ranks(found: dict[int, tuple[float, ...]]) -> dict[int, int]:
    """By number: 0 for those that none dominates, 1 for those that only these dominate, and so on."""
    rank: dict[int, int] = {}
    left = dict(found)
    while left:
        front = [key for key, own in left.items() if not any(dominates(other, own) for other in left.values())]
        rank |= dict.fromkeys(front, len({*rank.values()}))
        for key in front:
            del left[key]
    return rank


def in_order(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials, the best first.

    Those that meet all conditions come before those that do not, and these by how much they miss. With one goal its
    value decides; with two the Pareto rank, and within a rank the sum of both goals, each scaled to its range in the
    Pareto set.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    found = {trial.number: _turned(space, trial) for trial in finished}
    rank = ranks(found)
    front = [found[number] for number, its in rank.items() if its == 0]
    spans = [(min(column), (max(column) - min(column)) or 1.0) for column in zip(*front, strict=True)]

    def key(trial: Trial) -> tuple[float, ...]:
        own = found[trial.number]
        missed = sum(max(0.0, excess) for excess in trial.excess)
        together = sum((value - low) / span for value, (low, span) in zip(own, spans, strict=False))
        return (missed, rank[trial.number], together, trial.number)

    return sorted(finished, key=key)


def best(space: Space, trials: Sequence[Trial]) -> Trial | None:
    """The first in order, where any is finished."""
    return next(iter(in_order(space, trials)), None)


def pareto_set(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other dominates; with conditions, among those that meet them, where any do."""
    feasible = [trial for trial in trials if trial.feasible]
    found = points(space, feasible or trials)
    rank = ranks(found)
    return sorted((t for t in trials if rank.get(t.number) == 0), key=lambda t: found[t.number])


def kept(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose models are kept: the best, then by Pareto rank."""
    order = in_order(space, trials)
    rank = {
        **ranks(points(space, [trial for trial in trials if not trial.feasible])),
        **ranks(points(space, [trial for trial in trials if trial.feasible])),
    }
    rest = sorted(order[1:], key=lambda trial: (not trial.feasible, rank[trial.number]))
    return [*order[:1], *rest][: space.keep]
