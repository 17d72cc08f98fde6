"""Spaces, what is tried next, and what is best: without Ray."""

import csv
import io
import itertools
import json
import math
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.tuning import Space
from components.errors import ConfigError
from components.files import append_line
from components.load_config import checked, load_recipe
from components.tuning import expressions, pareto
from components.tuning.search import importances, next_point
from components.tuning.spaces import choose, corner_points, grid_points, load_sweep, own_point, recipe_of, sweep_name
from components.tuning.trials import Sweep, Trial, begin_trial, end_trial, read_trials, trials_csv
from pipelines import tune
from pipelines.sweeps.driver import make_scheduler
from pipelines.sweeps.shared import Shared, write_shared
from pipelines.sweeps.table import Table, short_names
from pipelines.sweeps.trial import Run

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "pipelines" / "recipes" / "demo.yaml"
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
EPSILON = {"objective.forget.weight": {"loguniform": [0.01, 0.1]}}


def load(tmp_path: Path, space: dict, *overrides: str) -> tuple:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(space, sort_keys=False))
    return load_sweep([str(DEMO), str(file)], overrides)


def space_of(**sections: Any) -> Space:
    return checked(Space, {"space": EPSILON, **sections}, "space")


# --- expressions ------------------------------------------------------------------------------------------------------


def test_expressions_are_numbers_of_names() -> None:
    known = {"a": 3.0, "b.c": 4.0}
    assert expressions.value("abs(a - 2 * b.c) / 5", known) == 1.0
    assert expressions.value("max(a, b.c) - min(a, -1) + log10(100)", known) == 7.0
    assert expressions.names("abs(a - b.c) + a") == ["a", "b.c"]
    assert expressions.excess("a >= 0.95 * b.c", known) == pytest.approx(0.8)
    assert expressions.excess("a <= b.c", known) == -1.0
    assert expressions.holds("a <= 3", known)
    assert not expressions.holds("a < 3", known)


@pytest.mark.parametrize(
    "text", ["a +", "open('x')", "a.b()", "[a]", "'a'", "a if b else c", "True", "a > b", "f(a)", "abs(a, b)", "min(a)"]
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Expression is not understood"):
        expressions.names(text)


@pytest.mark.parametrize(
    "text",
    [
        "-" * 5000 + "a",
        "-" * 100_000 + "a",
        "abs(" * 150 + "a" + ")" * 150,
        "a" + " + a" * 20_000,
        "a" + ".b" * 20_000 + "()",
        "(" * 5000 + "a" + ")" * 5000,
        "a" + " * a" * 100,
        "9" * 400,
        "9" * 5000,
        "1e400",
        "a ** 9",
        "'a' * 9",
        "f'{a}'",
    ],
    ids=range(13),
)
def test_expressions_that_never_end_are_refused_in_a_line(text: str) -> None:
    for condition in (False, True):
        with pytest.raises(ConfigError, match="is not understood") as error:
            expressions.names(f"{text} < 1" if condition else text, condition)
        assert len(str(error.value)) < 500


def test_numbers_stay_numbers() -> None:
    """A text times a whole number would be a longer text, a product of whole numbers a longer number."""
    for found in ("sgd", [1], None, {"a": 1}):
        for text in ("a * 999999999 < 1", "999999999 * a < 1", "b * a < 1", "a + a < 1", "max(a, a) < 1"):
            with pytest.raises(ValueError, match="a is no number"):
                expressions.holds(text, {"a": found, "b": 999999999})
    with pytest.raises(OverflowError):
        expressions.holds("a * b < 1", {"a": int("9" * 4000), "b": 2})
    assert expressions.holds("train.packing + n <= 3", {"train.packing": True, "n": 2})


def test_a_condition_is_one_comparison() -> None:
    for text in ("a", "a < b < c", "a == b"):
        with pytest.raises(ConfigError, match="Condition is not understood"):
            expressions.names(text, condition=True)


# --- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_shipped_spaces_fit_the_demo(file: Path) -> None:
    recipe, space, _ = load_sweep([str(DEMO), str(file)], [])
    drawn = random.Random(0)
    base = recipe.model_dump(mode="json")
    for number in range(20):
        params, _ = next_point(space, base, [], number + drawn.randrange(1000))
        recipe_of(recipe, params)


@pytest.mark.parametrize(
    ("space", "overrides", "words"),
    [
        ({"space": {"optimizer.gama": {"uniform": [1, 2]}}}, [], "Did you mean gamma"),
        ({"space": {"optimizer.gamma": {"unifrm": [1, 2]}}}, [], "Did you mean uniform"),
        ({"space": {"optimizer.gamma": {"uniform": [2, 2]}}}, [], r"uniform \[2, 2\] is empty"),
        ({"space": {"optimizer.gamma": {"loguniform": [0, 2]}}}, [], "touches 0"),
        ({"space": {"optimizer.gamma": {"quniform": [1, 2, 3]}}}, [], "step 3 must be"),
        ({"space": {"optimizer.gamma": {"uniform": [-1, 2]}}}, [], "greater than 0"),
        ({"space": {"train.epochs": {"uniform": [1, 9]}}}, [], "valid integer"),
        ({"space": {"optimizer.gamma": {}}}, [], "exactly one of"),
        ({"space": {"optimizer.gamma": {"choice": [1], "grid": [2]}}}, [], "exactly one of"),
        ({"space": {"optimizer.gamma": {"grid": [1, 2]}}}, [], "grid, which search.type=optuna does not walk"),
        ({"space": EPSILON, "search": {"type": "grid"}}, [], "search.type=grid tries given values only"),
        ({"space": EPSILON, "search": {"sampler": "nsga2"}}, [], "two goals"),
        ({"space": EPSILON, "goals": [{"minimise": "forget_truthratio"}]}, [], "Did you mean forget_truth_ratio"),
        ({"space": EPSILON, "goals": [{"minimise": "a", "maximise": "b"}]}, [], "either minimise or maximise"),
        ({"space": EPSILON, "goals": [{"minimise": "champion.model_utility"}]}, [], "is of no model"),
        ({"space": EPSILON, "subject_to": ["model_utility"]}, [], "Condition is not understood"),
        ({"space": EPSILON, "scheduler": {"type": "asha"}}, [], "set train.probe.every"),
        ({"space": EPSILON, "constraints": ["optimizer.gama < 1"]}, [], "Did you mean optimizer.gamma"),
        ({"space": EPSILON, "constraints": ["optimizer.type < 3"]}, [], "Constraint cannot be computed"),
        ({"space": EPSILON, "constraints": ["optimizer.lr / train.warmup_steps < 3"]}, [], "division by zero"),
        ({"space": {"optimizer.gama": {"uniform": [1, 2]}}, "constraints": ["train.epochs > 999"]}, [], "Did you mean"),
        ({"space": EPSILON, "settings": {"train.probe": {"every": 20}}, "scheduler": {"type": "asha", "grace": 10}}, [],
         "ends before the first probe"),
        ({"space": EPSILON, "keep": 2}, ["keep.x=2"], "valid integer"),
        ({"space": {"data.max_tokens": {"randint": [9, 99]}}}, [], "all trials share"),
        ({"space": {"seed": {"randint": [0, 9]}}}, [], "all trials share"),
        ({"space": {"train.workers": {"randint": [1, 2]}}}, [], "does not change the result"),
        ({"space": EPSILON}, ["objective.forget.weight=1"], "Searched settings are given too"),
        ({"space": EPSILON, "settings": {"objective.forget.weight": 1}}, [], "stands under settings too"),
        ({"space": EPSILON}, ["train.wrkers=1"], "Did you mean workers"),
        ({"space": EPSILON}, ["search.trails=1"], "Did you mean trials"),
        ({"space": EPSILON, "settings": {"train.wrkers": 1}}, [], "Did you mean workers"),
        ({"space": {"optimizer.type": {"choice": ["adamw", "influence"]}}}, [], "train.gradient_clipping=0"),
        ({"space": {"optimizer.lr": {"uniform": [0.1, 1]}, "optimizer.type": {"choice": ["soul", "adamw"]}}}, [],
         "optimizer.lr: has no effect"),
        ({"space": {"optimizer.gamma": {"uniform": [1, 2], "when": {"optimizer.type": "adamw"}}}}, [],
         "never searched"),
        ({"space": {"optimizer.gamma": {"uniform": [1, 2], "when": {"optimizer.lr": 1}},
                    "optimizer.lr": {"choice": [1, 2]}}}, [], "name optimizer.lr before it"),
        ({"space": {"objective.forget.weight": {"choice": [1, 2]}, "objective.forget": {"choice": [{"type": "npo"}]}}},
         [], "name objective.forget before it"),
    ],
)  # fmt: skip
def test_wrong_spaces_are_told_before_anything_starts(
    tmp_path: Path, space: dict, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, space, *overrides)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    space = {"optimizer.gama": {"uniform": [1, 2]}, "train.epochs": {"choice": [0, 1]}}
    with pytest.raises(ConfigError, match=r"2 mistake\(s\) in the space") as error:
        load(tmp_path, {"space": space})
    assert "greater than or equal to 1" in str(error.value)


def test_a_setting_is_searched_only_where_another_has_its_value(tmp_path: Path) -> None:
    space = {
        "optimizer.type": {"choice": ["soul", "adamw"]},
        "optimizer.lr": {"loguniform": [1e-4, 1e-3]},
        "optimizer.hessian_interval": {"lograndint": [1, 20], "when": {"optimizer.type": "soul"}},
        "objective.forget": {"choice": [{"type": "npo"}, {"type": "gradient_ascent"}]},
        "objective.forget.beta": {"uniform": [0.1, 1], "when": {"objective.forget.type": ["npo", "simnpo"]}},
    }
    recipe, found, _ = load(tmp_path, {"space": space})
    base = recipe.model_dump(mode="json")
    for number in range(30):
        params, _ = next_point(found, base, [], number)
        made = recipe_of(recipe, params)
        assert ("optimizer.hessian_interval" in params) == (made.optimizer.type == "soul")
        assert ("objective.forget.beta" in params) == (made.objective.forget.type == "npo")  # type: ignore[union-attr]
        assert made.optimizer.lr == params["optimizer.lr"]
    corners = [recipe_of(recipe, params) for params in corner_points(found, recipe)]
    assert {corner.optimizer.type for corner in corners} == {"soul", "adamw"}
    assert {getattr(corner.optimizer, "hessian_interval", None) for corner in corners} >= {1, 20, None}


def test_constraints_hold_for_every_draw(tmp_path: Path) -> None:
    space = {
        "optimizer.adaptive.soonest": {"randint": [1, 19]}, "optimizer.hessian_interval": {"randint": [2, 20]},
    }  # fmt: skip
    constraint = "optimizer.adaptive.soonest < optimizer.hessian_interval"
    recipe, found, _ = load(tmp_path, {"space": space, "constraints": [constraint]}, "optimizer.adaptive={}")
    base = recipe.model_dump(mode="json")
    for number in range(30):
        params, _ = next_point(found, base, [], number)
        assert params["optimizer.adaptive.soonest"] < params["optimizer.hessian_interval"]


PAIR = {"optimizer.curvature": ["gnb", "hutchinson"], "optimizer.batch_factor": [None, 1.0]}


def test_a_combination_that_is_no_recipe_is_not_tried(tmp_path: Path) -> None:
    """Each choice goes by itself, but batch_factor is of gnb only: it would end the sweep at its trial."""
    stage = "train.zero_stage=0"
    recipe, found, _ = load(tmp_path, {"space": {path: {"choice": values} for path, values in PAIR.items()}}, stage)
    base = recipe.model_dump(mode="json")
    with pytest.raises(ConfigError):
        recipe_of(recipe, {"optimizer.curvature": "hutchinson", "optimizer.batch_factor": 1.0})
    drawn = [next_point(found, base, [], number)[0] for number in range(20)]
    assert {(p["optimizer.curvature"], p["optimizer.batch_factor"]) for p in drawn} == {
        ("gnb", None), ("gnb", 1.0), ("hutchinson", None)
    }  # fmt: skip
    grid = {"space": {path: {"grid": values} for path, values in PAIR.items()}, "search": {"type": "grid"}}
    recipe, found, _ = load(tmp_path, grid, stage)
    assert len(grid_points(found, base)) == 3


def test_constraints_that_nothing_meets_are_told(tmp_path: Path) -> None:
    recipe, found, _ = load(tmp_path, {"space": EPSILON, "constraints": ["objective.forget.weight > 5"]})
    with pytest.raises(ConfigError, match="No draw of 200"):
        next_point(found, recipe.model_dump(mode="json"), [], 0)


def test_a_grid_is_all_combinations_once(tmp_path: Path) -> None:
    space = {
        "optimizer.type": {"grid": ["soul", "adamw"]},
        "optimizer.lr": {"grid": [1, 2]},
        "optimizer.hessian_interval": {"grid": [3, 4, 5], "when": {"optimizer.type": "soul"}},
    }
    recipe, found, _ = load(tmp_path, {"space": space, "search": {"type": "grid"}})
    base = recipe.model_dump(mode="json")
    points = grid_points(found, base)
    assert len(points) == 2 * 3 + 2
    assert points[0] == {"optimizer.type": "soul", "optimizer.lr": 1, "optimizer.hessian_interval": 3}
    assert [next_point(found, base, [], i)[0] for i in range(8)] == points


def test_the_first_trial_is_the_recipes_own_where_the_space_holds_it(tmp_path: Path) -> None:
    recipe, space, _ = load(tmp_path, {"space": EPSILON})
    assert own_point(space, recipe.model_dump(mode="json")) == {"objective.forget.weight": 0.03}
    recipe, space, _ = load(tmp_path, {"space": {"objective.forget.weight": {"uniform": [0.5, 1]}}})
    assert own_point(space, recipe.model_dump(mode="json")) is None


def test_a_trial_is_a_worker(tmp_path: Path) -> None:
    for given, found in ((0, 1), (1, 1), (2, 2)):
        assert load(tmp_path, {"space": EPSILON}, f"train.workers={given}")[0].train.workers == found


def test_the_name_follows_what_is_searched_and_not_how_much(tmp_path: Path) -> None:
    def name(space: dict, *overrides: str) -> str:
        return sweep_name(*load(tmp_path, space, *overrides))

    own = name({"space": EPSILON})
    assert own == name({"space": EPSILON}, "search.trials=99", "concurrent=1", "keep=9", "storage=/elsewhere")
    assert own != name({"space": EPSILON}, "search.seed=1")
    assert own != name({"space": EPSILON}, "optimizer.lr=1e-5")
    wider = {"objective.forget.weight": {"loguniform": [0.01, 0.2]}}
    assert own != name({"space": wider})


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_the_same_after_it_was_written(tmp_path: Path, file: Path) -> None:
    recipe = load_recipe([file])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe([tmp_path / "again.yaml"]) == recipe


def test_help_and_dry_run_need_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pipelines.tune import main\n"
        f"assert main([{str(DEMO)!r}, {str(SPACES[0])!r}, 'storage={tmp_path}', '--dry-run']) == 0\n"
        "assert not {'torch', 'ray', 'mlflow', 'optuna'} & {*sys.modules}, sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "trials    12 of 70 steps" in done.stdout


# --- search -----------------------------------------------------------------------------------------------------------


def pretend(sweep: Path, recipe: Any, space: Space, count: int, lose: set[int] = frozenset()) -> list[dict]:  # type: ignore[assignment]
    """A sweep one trial after the other on a made-up function; trials of `lose` are begun, lost and begun again."""
    base = recipe.model_dump(mode="json")
    while len(trials := read_trials(sweep, space)) < count or trials[-1].state == "running":
        if trials and trials[-1].state == "running":
            folder, params = trials[-1].folder, trials[-1].params
        else:
            params, notes = next_point(space, base, trials, len(trials))
            folder = begin_trial(sweep, len(trials), params, notes)
            if len(trials) in lose:
                continue
        x = math.log10(params["objective.forget.weight"])
        values = [(x + 1.7) ** 2, (x + 1.2) ** 2][: len(space.goals)]
        state: Any = "failed" if folder.name == "trial-003" else "finished"
        about = {"reason": "NaN"} if state == "failed" else {"values": values, "excess": [-x - 1.5]}
        end_trial(folder, state, **about)
    return [trial.params for trial in read_trials(sweep, space)]


@pytest.mark.parametrize("search", [{"type": "optuna"}, {"type": "random"}, {"type": "optuna", "sampler": "nsga2"}])
def test_a_sweep_repeats_exactly_also_when_it_was_interrupted(tmp_path: Path, search: dict) -> None:
    goals = [{"minimise": "forget_truth_ratio"}, {"maximise": "model_utility"}]
    space = {
        "space": {**EPSILON, "optimizer.hessian_interval": {"lograndint": [2, 20]}},
        "goals": goals if search.get("sampler") == "nsga2" else goals[:1], "search": {**search, "startup": 4},
    }  # fmt: skip
    recipe, found, _ = load(tmp_path, space)
    first, again, lossy = (tmp_path / name for name in ("first", "again", "lossy"))
    expected = pretend(first, recipe, found, 14)
    assert pretend(again, recipe, found, 14) == expected
    assert pretend(lossy, recipe, found, 14, lose={2, 7, 11}) == expected
    assert len({json.dumps(params) for params in expected}) == 14
    other = found.model_copy(update={"search": found.search.model_copy(update={"seed": 1})})
    assert pretend(tmp_path / "other", recipe, other, 14)[1:] != expected[1:]


def test_the_estimate_finds_what_chance_does_not(tmp_path: Path) -> None:
    """The sampler is told the conditions: after its start it draws where they hold, near the lowest value."""
    recipe, space, _ = load(tmp_path, {"space": EPSILON, "search": {"startup": 6}})
    points = [math.log10(p["objective.forget.weight"]) for p in pretend(tmp_path / "sweep", recipe, space, 30)]
    late = points[15:]
    assert sum(abs(x + 1.5) < 0.15 for x in late) > len(late) / 2, points


# --- what is best -----------------------------------------------------------------------------------------------------


def trial(
    number: int, values: list[float], excess: float = 0.0, utility: float = 0.5, state: Any = "finished"
) -> Trial:
    return Trial(
        number, Path(f"trial-{number:03d}"), {"objective.forget.weight": 0.01 * (number + 1)}, {}, state, values,
        [excess] if values else [], {"model_utility": utility} if values else {}, {}, "", 5, {"train": 1.0},
    )  # fmt: skip


def test_the_pareto_set_is_what_brute_force_finds_in_the_csv() -> None:
    goals = [{"minimise": "forget_probability"}, {"maximise": "model_utility"}]
    space = space_of(goals=goals, subject_to=[])
    draw = random.Random(1)
    trials = [trial(i, [draw.random().__round__(1), draw.random().__round__(1)]) for i in range(60)]
    trials.append(trial(60, [], state="failed"))
    rows = [row for row in csv.DictReader(io.StringIO(trials_csv(trials, space))) if row["state"] == "finished"]
    small, large = (
        f"{way} {name}" for way, name in (("minimise", "forget_probability"), ("maximise", "model_utility"))
    )
    points = {int(row["trial"]): (float(row[small]), -float(row[large])) for row in rows}
    beaten = {
        a for (a, p), (_, q) in itertools.permutations(points.items(), 2)
        if q[0] <= p[0] and q[1] <= p[1] and q != p
    }  # fmt: skip
    assert {t.number for t in pareto.pareto_set(space, trials)} == {*points} - beaten
    rank = pareto.ranks(pareto.points(space, trials))
    assert {number for number, r in rank.items() if r == 0} == {*points} - beaten
    assert max(rank.values()) > 1


def test_conditions_come_before_goals() -> None:
    space = space_of()
    trials = [trial(0, [0.3]), trial(1, [0.1], excess=0.02), trial(2, [0.2]), trial(3, [0.0], excess=0.5),
              trial(4, [], state="stopped")]  # fmt: skip
    assert [t.number for t in pareto.in_order(space, trials)] == [2, 0, 1, 3]
    assert pareto.best(space, trials[1:2] + trials[3:]) == trials[1]
    assert {t.number for t in pareto.pareto_set(space, trials)} == {2}


def test_models_are_kept_by_pareto_rank() -> None:
    space = space_of(keep=2)
    trials = [trial(0, [0.3], utility=0.9), trial(1, [0.2], utility=0.4), trial(2, [0.25], utility=0.3)]
    assert [t.number for t in pareto.kept(space, trials)] == [1, 0]


def test_what_meets_the_conditions_is_kept_first_and_ranked_by_itself() -> None:
    """Trial 3 dominates trial 1, and misses a condition: the Pareto set is 0, 1 and 2 all the same."""
    space = space_of(keep=3)
    trials = [trial(0, [0.1], utility=0.3), trial(1, [0.3], utility=0.7), trial(2, [0.2], utility=0.5),
              trial(3, [0.05], 0.1, utility=0.9)]  # fmt: skip
    assert {t.number for t in pareto.pareto_set(space, trials)} == {0, 1, 2}
    assert {t.number for t in pareto.kept(space, trials)} == {0, 1, 2}


def test_a_trial_that_is_beaten_does_not_change_which_is_the_best() -> None:
    """It would when goals were scaled to the range of all trials; the best one's model may be gone by then."""
    space = space_of(goals=[{"minimise": "forget_probability"}, {"maximise": "model_utility"}], subject_to=[])
    trials = [trial(0, [0.1, 0.5]), trial(1, [0.3, 0.72])]
    best = pareto.best(space, trials)
    assert pareto.best(space, [*trials, trial(2, [0.9, 0.1])]) == best


def test_trials_are_read_by_number(tmp_path: Path) -> None:
    for number in (1000, 101, 2):
        begin_trial(tmp_path, number, {}, {})
    assert [t.number for t in read_trials(tmp_path, space_of())] == [2, 101, 1000]


def test_importance_tells_what_decides() -> None:
    both = {**EPSILON, "optimizer.gamma": {"uniform": [1, 2]}}
    space = space_of(space=both)
    draw = random.Random(0)
    trials = []
    for i in range(40):
        weight, gamma = 10 ** draw.uniform(-2, -1), draw.uniform(1, 2)
        params = {"objective.forget.weight": weight, "optimizer.gamma": gamma}
        trials.append(trial(i, [abs(math.log10(weight) + 1.5)])._replace(params=params))
    found = importances(space, trials)
    assert next(iter(found)) == "objective.forget.weight"
    assert found["objective.forget.weight"] > 0.8


def test_names_are_as_short_as_they_can_be() -> None:
    paths = ["objective.forget.weight", "optimizer.lr", "objective.forget.beta", "optimizer.beta"]
    assert [*short_names(paths).values()] == ["ε1", "lr", "forget.beta", "optimizer.beta"]


def test_choose_follows_the_order_of_the_space() -> None:
    space = space_of(space={"a": {"choice": [1]}, "b": {"choice": [2], "when": {"a": 1}}})
    assert choose(space, {}, lambda path, searched: searched.values[0]) == {"a": 1, "b": 2}
    assert choose(space, {}, lambda path, searched: 5) == {"a": 5}


# --- while it goes on -------------------------------------------------------------------------------------------------


def reported(sweep: Sweep, number: int, values: dict[int, float], state: Any) -> Any:
    """A trial's folder, with a probe of the normal rows at each step."""
    folder = begin_trial(sweep.folder, number, {"objective.forget.weight": 0.04}, {})
    for step, value in values.items():
        append_line(folder / "metrics.jsonl", {"step": step, "steps": 9, "probe/normal_probability": value})
    if state != "running":
        end_trial(folder, state, values=[1.0] if state == "finished" else [])
    return read_trials(sweep.folder, sweep.space)[number]


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_that_begins_again_knows_what_was_reported(tmp_path: Path, kind: str) -> None:
    """After the driver was killed, a trial is stopped by trials that ended before."""
    settings = {"train.probe": {"every": 1}}
    stops = {"type": kind, "grace": 2, "reduction": 2, "maximise": "probe.normal_probability"}
    recipe, space, _ = load(tmp_path, {"settings": settings, "space": EPSILON, "scheduler": stops})
    sweep = Sweep(recipe, space, tmp_path / "sweep")
    for number, height in enumerate((0.5, 0.6, 0.7)):
        reported(sweep, number, {1: height, 2: height, 3: height}, "finished")
    for value, decision in ((0.1, "STOP"), (0.9, "CONTINUE")):
        scheduler = make_scheduler(sweep)
        now: Any = Standing("now")
        scheduler.on_trial_add(None, now)
        assert scheduler.on_trial_result(None, now, {"step": 1, "compared": value}) == "CONTINUE"
        assert scheduler.on_trial_result(None, now, {"step": 2, "compared": value}) == decision
        scheduler.on_trial_complete(None, now, {"step": 2, "done": True})
        other: Any = Standing("other")
        scheduler.on_trial_add(None, other)
        assert scheduler.on_trial_result(None, other, {"step": 2, "compared": 0.9}) == "CONTINUE"


def test_where_no_trial_came_to_its_end_the_reasons_are_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"space": EPSILON, "search": {"trials": 1}}))
    typed = [str(DEMO), str(file), f"storage={tmp_path}"]
    sweep = tune.parse(typed)
    end_trial(begin_trial(sweep.folder, 0, {"objective.forget.weight": 0.03}, {}), "failed", reason="no memory")
    assert tune.main(typed) == 1
    told = capsys.readouterr()
    assert "1 of 1 are done" in told.out
    assert f"No trial came to its end (folder={sweep.folder}, stopped=0, failed=1)" in told.err
    [row] = csv.DictReader((sweep.folder / "trials.csv").open())
    assert row["reason"] == "no memory"


@pytest.mark.parametrize(("weight", "told"), [(0.03, {}), (0.04, {"compared": 0.5})])
def test_the_recipes_own_point_is_never_compared(tmp_path: Path, weight: float, told: dict) -> None:
    """It is what the others are measured by, so that no scheduler may stop it."""
    stops = {"maximise": "probe.normal_probability"}
    recipe, space, _ = load(tmp_path, {"settings": {"train.probe": {"every": 1}}, "space": EPSILON, "scheduler": stops})
    sweep = Sweep(recipe, space, tmp_path / "sweep")
    folder = begin_trial(sweep.folder, 0, {"objective.forget.weight": weight}, {})
    append_line(folder / "metrics.jsonl", {"step": 1, "steps": 9, "probe/normal_probability": 0.5})
    write_shared(sweep.folder, Shared(recipe, space, {}, {}, {}, {}, {}))
    actor = Run.__new__(Run)
    actor.look_at(sweep.folder, 0)
    actor.thread = threading.Thread()
    assert actor.step() == {"number": 0, "step": 1, **told}


def test_a_trial_that_has_done_all_its_steps_is_not_compared(tmp_path: Path) -> None:
    """Stopped there, it would have cost everything and would not be evaluated."""
    recipe, space, _ = load(tmp_path, {"settings": {"train.probe": {"every": 1}}, "space": EPSILON})
    stops = space.scheduler.model_copy(update={"maximise": "probe.normal_probability"})
    sweep = Sweep(recipe, space.model_copy(update={"scheduler": stops}), tmp_path / "sweep")
    assert reported(sweep, 0, {7: 0.5, 8: 0.6, 9: 0.7}, "running").reports == {7: 0.5, 8: 0.6}


class Standing:
    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def test_the_table_stays_in_place_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "8")
    recipe, space, _ = load(tmp_path, {"settings": {"train.probe": {"every": 1}}, "space": EPSILON})
    sweep = Sweep(recipe, space, tmp_path / "sweep")
    shown = Table(space)
    shown.live = True
    with shown:
        for number in range(12):
            shown.begins(reported(sweep, number, {1: 0.5}, "running"))
            shown.drawn_at = 0.0
    out = capsys.readouterr().out
    frames = out.split("\x1b[J")
    assert all(len(line) < 60 for frame in frames for line in frame.partition("\x1b")[0].splitlines())
    last = frames[-1].splitlines()
    assert last[0].split() == ["trial", "state", "ε1", "step", "forget", "normal", "value", "time"]
    assert [line.split()[0] for line in last[2:]] == ["8", "9", "10", "11"]
    assert "\x1b[6F" in out
    shown = Table(space)
    shown.reports(reported(sweep, 0, {2: 0.6, 3: 0.7}, "running"), 2)
    assert capsys.readouterr().out == "  trial-000 step    2 normal 0.6  0s\n"
