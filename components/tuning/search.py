"""What to try next: a function of the space, the seed and what is known of the trials so far.

Optuna's study is made anew from the trials' folders each time, so that a sweep that was stopped goes on as if it had
not been.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from components.config import digest
from components.config.tuning import Searched, Space
from components.errors import ConfigError
from components.tuning.spaces import Params, choose, grid_points, own_point, possible
from components.tuning.trials import Trial

_TRIES = 200  # draws for a point that meets the constraints


def planned_trials(space: Space, base: dict[str, Any]) -> int:
    """How many trials a whole sweep has."""
    return len(grid_points(space, base)) if space.search.type == "grid" else space.search.trials


def next_point(
    space: Space, base: dict[str, Any], trials: Sequence[Trial], number: int
) -> tuple[Params, dict[str, Any]]:
    """(settings of trial `number`, what the sampler notes of them), after `trials`. `base` are the recipe's settings.

    The first trial has the recipe's own values where the space holds them.

    Raises:
        ConfigError: when no draw is a recipe that meets the constraints.
    """
    if space.search.type == "grid":
        return grid_points(space, base)[number], {}
    if number == 0 and (own := own_point(space, base)):
        return own, {}
    for attempt in range(_TRIES):
        study = make_study(space, trials, int(digest([space.search.seed, number, attempt], 8), 16))
        trial = study.ask()
        params = choose(space, base, lambda path, searched, trial=trial: suggest(trial, path, searched))  # type: ignore[misc]
        if possible(space, base, params):
            notes = study._storage.get_trial_system_attrs(trial._trial_id)
            return params, {key: value for key, value in notes.items() if not key.startswith("constraints")}
    raise ConfigError(
        f"No draw of {_TRIES} is a recipe that meets the constraints ({'; '.join(space.constraints) or 'none'}). "
        "Expected some. Loosen them, or the ranges."
    )


def suggest(trial: Any, path: str, searched: Searched) -> Any:
    """Let an Optuna trial give a value."""
    kind, values = searched.kind, searched.values
    if kind in ("choice", "grid"):
        labels = [label(value) for value in values]
        return values[labels.index(trial.suggest_categorical(path, labels))]
    if kind in ("randint", "lograndint"):
        return trial.suggest_int(path, *values, log=kind == "lograndint")
    step = values[2] if kind == "quniform" else None
    return trial.suggest_float(path, *values[:2], step=step, log=kind == "loguniform")


def label(value: Any) -> Any:
    """What Optuna knows a choice by: a section by the digest of its content."""
    return f"section {digest(value)}" if isinstance(value, dict | list) else value


def make_study(space: Space, trials: Sequence[Trial], seed: int = 0) -> Any:
    """An Optuna study that knows the trials; goals are turned so that small is good."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * len(space.goals), sampler=_sampler(space, seed))
    for trial in trials:
        study.add_trial(_frozen(space, trial))
    return study


def _sampler(space: Space, seed: int) -> Any:
    import optuna

    search = space.search
    if search.type == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, search.startup))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup, constant_liar=True)


def _frozen(space: Space, trial: Trial) -> Any:
    from optuna.trial import TrialState, create_trial

    states = {
        "running": TrialState.RUNNING, "finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }  # fmt: skip
    state = states[trial.state]
    if trial.state == "stopped" and len(space.goals) > 1:
        state = TrialState.FAIL  # with two goals Optuna knows no pruning
    values = [goal.sign * value for goal, value in zip(space.goals, trial.values, strict=False)]
    told = state in (TrialState.COMPLETE, TrialState.PRUNED)
    missed = trial.excess or [0.0] * len(space.subject_to)
    return create_trial(
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        params={path: label(value) for path, value in trial.params.items() if path in space.space},
        distributions={path: distribution(space.space[path]) for path in trial.params if path in space.space},
        system_attrs={**trial.sampler},
        intermediate_values={step: -value for step, value in trial.reports.items()} if len(space.goals) == 1 else None,
        constraints={str(i): value for i, value in enumerate(missed)} if told else None,
    )


def distribution(searched: Searched) -> Any:
    """As Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind, values = searched.kind, searched.values
    if kind in ("choice", "grid"):
        return CategoricalDistribution([label(value) for value in values])
    if kind in ("randint", "lograndint"):
        return IntDistribution(values[0], values[1], log=kind == "lograndint")
    step = values[2] if kind == "quniform" else None
    return FloatDistribution(values[0], values[1], log=kind == "loguniform", step=step)


def importances(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each setting in what decides the first goal (PED-ANOVA), the largest first; empty where too few tell."""
    import optuna

    finished = [trial for trial in trials if trial.state == "finished"]
    if len(finished) < 4:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it looks for low values, which goals are turned into
        study = make_study(space, finished)
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial: trial.values[0]
            )
        except (ValueError, RuntimeError):  # all alike
            return {}
    return dict(found)
