"""A space over a recipe: what is searched when, and whether every point of it is a recipe."""

import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config import LONGEST_NAME, NOT_PART_OF_TRAINING, Recipe, digest, leaves
from components.config.tuning import Searched, Space
from components.errors import ConfigError
from components.load_config import checked, load_recipe, merge, nested, parse_override, read_yaml
from components.tuning import expressions

Params = dict[str, Any]
"""Values of the searched settings, by dotted path; those that are not searched under these are left out."""

_SHARED = {
    "name", "storage", "seed", "if_exists", "data", "models", "finetune", "evaluation", "tracking", "attacks", "gates",
}  # fmt: skip


def load_sweep(files: Sequence[str], overrides: Sequence[str]) -> tuple[Recipe, Space, str]:
    """(recipe that all trials share, space, its name) from recipes and one space file, in any order.

    An override whose path begins with a section of the space, such as search.trials=4, is for the space.

    Raises:
        ConfigError: naming every mistake in the recipe, in the space, or in what comes of both.
    """
    found = {file: read_yaml(Path(file), "file") for file in files}
    spaces = [file for file, raw in found.items() if "space" in raw]
    recipes = [file for file in files if file not in spaces]
    if len(spaces) != 1 or not recipes:
        raise ConfigError(
            f"A sweep needs a recipe and one space (recipes={len(recipes)}, spaces={len(spaces)}). Expected, for "
            "example, pipelines/recipes/demo.yaml tune_spaces/demo.yaml."
        )
    for_space = [text for text in overrides if text.partition("=")[0].partition(".")[0] in Space.model_fields]
    raw = found[spaces[0]]
    for text in for_space:
        raw = _over(raw, parse_override(text))
    space = checked(Space, raw, "space")
    for_recipe = [text for text in overrides if text not in for_space]
    if twice := {text.partition("=")[0] for text in for_recipe} & {*space.space}:
        raise ConfigError(f"Searched settings are given too ({', '.join(sorted(twice))}). Leave them to the space.")
    settings = [f"{path}={json.dumps(value)}" for path, value in space.settings.items()]
    recipe = load_recipe(recipes, [*settings, *for_recipe])
    if recipe.train.workers == 0:  # a trial's actor is a worker: what one computes, on its own CPUs
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})})
    check_space(space, recipe)
    name = Path(spaces[0]).stem
    if len(sweep_name(recipe, space, name).encode()) > LONGEST_NAME:
        raise ConfigError(
            f"Sweep's folder name would be too long (space={name[:30]}…, recipe={recipe.name[:30]}…). Expected at most "
            f"{LONGEST_NAME} bytes. Give the space's file or the recipe a shorter name."
        )
    return recipe, space, name


def _over(raw: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `raw`, section by section; unlike a recipe's, those of a space keep their keys with another type."""
    both = {
        key: _over(raw[key], value)
        for key, value in new.items()
        if isinstance(value, dict) and isinstance(raw.get(key), dict)
    }
    return {**raw, **new, **both}


def sweep_name(recipe: Recipe, space: Space, name: str) -> str:
    """`<space>-<recipe>-<hash>`: changes with all but how many trials there are, at once or kept, and where."""
    what = space.model_dump(mode="json", exclude={"concurrent": True, "keep": True, "search": {"trials"}})
    how = recipe.model_dump(mode="json", exclude={"storage": True, "if_exists": True, "tracking": True})
    return f"{name}-{recipe.name}-{digest([how, list(what['space']), what], 8)}"


# --- points -----------------------------------------------------------------------------------------------------------


def choose(space: Space, base: dict[str, Any], pick: Callable[[str, Searched], Any]) -> Params:
    """Let `pick` give a value for each setting that is searched, one after the other: the first ones decide which."""
    params: Params = {}
    raw = base
    for path, searched in space.space.items():
        if all(_fits(raw, other, wanted) for other, wanted in searched.when.items()):
            params[path] = pick(path, searched)
            raw = merge(raw, nested(path, params[path]))
    return params


def with_params(base: dict[str, Any], params: Params) -> dict[str, Any]:
    """A recipe's settings with those of a point."""
    for path, value in params.items():
        base = merge(base, nested(path, value))
    return base


def recipe_of(base: Recipe, params: Params) -> Recipe:
    """The recipe at a point.

    Raises:
        ConfigError: where the point is none.
    """
    return checked(Recipe, with_params(base.model_dump(mode="json"), params), "recipe")


def allowed(space: Space, settings: dict[str, Any]) -> bool:
    """Whether a recipe's settings meet the space's constraints; one on settings that are not there does not apply.

    Raises:
        ConfigError: where a constraint cannot be computed, as of settings that are no numbers.
    """
    return all(_holds_for(text, settings) for text in space.constraints)


def _holds_for(constraint: str, settings: dict[str, Any]) -> bool:
    found = {name: look_up(settings, name) for name in expressions.names(constraint, condition=True)}
    try:
        return None in found.values() or expressions.holds(constraint, found)
    except (TypeError, ArithmeticError, ValueError) as error:
        shown = ", ".join(f"{name}={json.dumps(value)}" for name, value in found.items())
        raise ConfigError(
            f"Constraint cannot be computed ({constraint}; {shown}): {error}. Expected settings that are numbers."
        ) from None


def possible(space: Space, base: dict[str, Any], params: Params) -> bool:
    """Whether a point meets the constraints and is a recipe: not all choices go together."""
    raw = with_params(base, params)
    try:
        return allowed(space, raw) and bool(checked(Recipe, raw, "recipe"))
    except ConfigError:
        return False


def _fits(raw: dict[str, Any], path: str, wanted: Any) -> bool:
    return look_up(raw, path) in (wanted if isinstance(wanted, list) else [wanted])


def look_up(raw: Any, path: str) -> Any:
    """What stands at a dotted path, None where nothing does."""
    for key in path.split("."):
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


_MOST_POINTS = 10_000


def grid_points(space: Space, base: dict[str, Any]) -> list[Params]:
    """All combinations, the last setting changing first; those that differ only in what is not searched, once.

    Raises:
        ConfigError: when they are more than anybody can run.
    """
    count = math.prod(len(searched.values) for searched in space.space.values())
    if count > _MOST_POINTS:
        raise ConfigError(
            f"The grid has {count:,} points. Expected at most {_MOST_POINTS:,}. Search fewer settings or values, or "
            "set search.type=optuna."
        )
    found: dict[str, Params] = {}
    for values in itertools.product(*(searched.values for searched in space.space.values())):
        given = dict(zip(space.space, values, strict=True))
        params = choose(space, base, lambda path, _, given=given: given[path])  # type: ignore[misc]
        if possible(space, base, params):
            found.setdefault(json.dumps(params), params)
    return list(found.values())


def own_point(space: Space, base: dict[str, Any]) -> Params | None:
    """The recipe's own values, where the space holds them."""
    params = choose(space, base, lambda path, searched: look_up(base, path))
    inside = all(_holds(space.space[path], value) for path, value in params.items())
    return params if inside and params and allowed(space, base) else None


def _holds(searched: Searched, value: Any) -> bool:
    if searched.kind in ("choice", "grid"):
        return value in searched.values
    low, high, *step = searched.values
    if not isinstance(value, int | float) or not low <= value <= high:
        return False
    if searched.kind in ("randint", "lograndint"):
        return isinstance(value, int)
    return not step or abs((value - low) / step[0] - round((value - low) / step[0])) < 1e-9


# --- checks -----------------------------------------------------------------------------------------------------------


def check_space(space: Space, recipe: Recipe) -> None:
    """Try the ends and choices of each setting in the recipe: a wrong path, value or combination is told now.

    Raises:
        ConfigError: naming all of them.
    """
    problems = [*_path_problems(space), *_expression_problems(space, recipe)]
    if not problems:
        problems = list(dict.fromkeys(_corner_problems(space, recipe)))
    if problems:
        raise ConfigError(f"{len(problems)} mistake(s) in the space:\n" + "\n".join(f"  {text}" for text in problems))


def _path_problems(space: Space) -> Iterator[str]:
    for path in space.space:
        first, _, rest = path.partition(".")
        if first in _SHARED:
            yield f"{path}: cannot be searched, since all trials share what is made from {first}."
        if first == "train" and rest in NOT_PART_OF_TRAINING:
            yield f"{path}: cannot be searched, since it does not change the result. Put it under settings."


def _corner_problems(space: Space, recipe: Recipe) -> Iterator[str]:
    base = recipe.model_dump(mode="json")
    constrained = {name for text in space.constraints for name in expressions.names(text, condition=True)}
    there: set[str] = set()
    for path in space.space:
        points = list(_corners(space, base, path))
        if not points:
            yield f"{path}: is never searched, since nothing gives {json.dumps(space.space[path].when)}."
        for params in points:
            raw = with_params(base, params)
            within = allowed(space, raw)
            try:
                there |= {*leaves(checked(Recipe, raw, "recipe").model_dump(mode="json"))}
            except ConfigError as error:
                shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in params.items())
                told = "; ".join(line.strip() for line in str(error).splitlines()[1:])
                if within or "unknown key" in told:
                    yield f"{told} With {shown}." if told.startswith("recipe") else told
                continue
            if not within:
                continue
            for lost in (key for key, value in params.items() if not _contains(look_up(raw, key), value)):
                given = f"{path}={json.dumps(params[path])}"
                yield f"{lost}: has no effect with {given}; name it after what it depends on, with a when."
    for name in sorted(constrained - there) if there else []:
        yield f"constraint names {name}, which is no setting.{_nearest(name, there)}"


def _contains(there: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(there, dict) and (there.get("type") == value["type"] if "type" in value else True)
    return there == value


def corner_points(space: Space, recipe: Recipe) -> list[Params]:
    """Points that show all that trials may ask for: each end and each choice of each setting once."""
    base = recipe.model_dump(mode="json")
    found = [params for path in space.space for params in _corners(space, base, path)]
    return [params for params in found if allowed(space, with_params(base, params))]


def _corners(space: Space, base: dict[str, Any], path: str) -> Iterator[Params]:
    """The points with each end of `path`, other settings at their first value, where it is searched at all."""
    deciding = [
        other
        for other in space.space
        if any(key == other or key.startswith(f"{other}.") for key in _conditions(space, path))
    ]
    for value in _ends(space.space[path]):
        for others in itertools.product(*(_ends(space.space[other]) for other in deciding)):
            fixed = {**dict(zip(deciding, others, strict=True)), path: value}
            first = choose(
                space, base,
                lambda key, searched, fixed=fixed: fixed.get(key, _ends(searched)[0]),  # type: ignore[misc]
            )  # fmt: skip
            if path in first:
                yield first
                break


def _conditions(space: Space, path: str) -> set[str]:
    found = {*space.space[path].when}
    for other in list(found):
        if other in space.space:
            found |= _conditions(space, other)
    return found


def _ends(searched: Searched) -> list[Any]:
    """Values that stand for all."""
    if searched.kind in ("choice", "grid"):
        return searched.values
    low, high = searched.values[:2]
    if searched.kind == "quniform":
        return [low, low + searched.values[2], high]
    return [low, low + (high - low) / 3.1, high] if "uniform" in searched.kind else [low, high]


def _expression_problems(space: Space, recipe: Recipe) -> Iterator[str]:
    known, measured = metric_names(recipe), recipe.evaluation.lm_eval
    general = tuple(f"lm_eval_{task}_" for task in measured.tasks) if measured else ()
    for text, condition in [(g.expression, False) for g in space.goals] + [(t, True) for t in space.subject_to]:
        try:
            used = expressions.names(text, condition)
        except ConfigError as error:
            yield str(error)
            continue
        for name in used:
            model, _, metric = name.rpartition(".")
            if model not in ("", "original", "retain_only"):
                yield f"{text}: {name} is of no model; expected a metric, original.<metric> or retain_only.<metric>."
            elif metric not in known and not metric.startswith(general):
                yield f"{text}: the recipe's evaluation does not compute {metric}.{_nearest(metric, known)}"
    for text in space.constraints:
        try:
            expressions.names(text, condition=True)
        except ConfigError as error:
            yield str(error)
    if space.scheduler.type != "none":
        yield from _scheduler_problems(space, recipe)


def _scheduler_problems(space: Space, recipe: Recipe) -> Iterator[str]:
    if not recipe.train.probe:
        yield f"scheduler.type={space.scheduler.type} compares what train.probe measures: set train.probe.every, too."
    elif recipe.train.probe.every > space.scheduler.grace:
        yield (
            f"scheduler.grace={space.scheduler.grace} ends before the first probe (train.probe.every="
            f"{recipe.train.probe.every}): what is compared must be of the same step. Raise grace, or probe earlier."
        )
    probed = {f"probe.{group}_probability" for group in recipe.objective.terms() if group != "random"}
    try:
        used = expressions.names(space.scheduler.maximise)
    except ConfigError as error:
        yield str(error)
        return
    for name in used:
        if not name.startswith("train.") and name not in probed:
            yield f"scheduler.maximise: no step measures {name}.{_nearest(name, probed)}"


def metric_names(recipe: Recipe) -> set[str]:
    """Metrics that the recipe's evaluation may compute."""
    from components.evaluation.membership import ATTACKS
    from components.evaluation.metrics import ROW_METRICS

    evaluation = recipe.evaluation
    found = {f"{name}_{metric}" for name in evaluation.sets for metric in [*ROW_METRICS, "perplexity"]}
    if "forget" in evaluation.sets:
        found |= {"forget_quality", "forget_quality_log10"}
    if {"forget", "holdout"} <= {*evaluation.sets}:
        found |= {*(f"mia_{name}" for name in ATTACKS), "privleak"}
    if evaluation.utility:
        found.add("model_utility")
    return {name for name in found if evaluation.wants(name)}


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def judged(space: Space, metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """`values` of the goals and by how much each condition is missed (`excess`), of one trial's metrics.

    Raises:
        KeyError: with the name of a metric that is not there.
    """
    known = {**metrics, **{f"{model}.{name}": value for model, its in others.items() for name, value in its.items()}}
    return {
        "values": [expressions.value(goal.expression, known) for goal in space.goals],
        "excess": [expressions.excess(text, known) for text in space.subject_to],
    }
