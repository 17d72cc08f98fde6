"""What a sweep leaves for people: trials.csv, best.yaml, plots, report, and a summary to read."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from components.config import Recipe
from components.config.tuning import Space
from components.console import number, table
from components.files import write_whole, writing
from components.html_page import html_table, images, page, png
from components.tuning import pareto, plots
from components.tuning.search import importances
from components.tuning.spaces import recipe_of
from components.tuning.trials import Trial, goal_name, trials_csv
from pipelines.environment import command
from pipelines.sweeps.table import setting_text, settings_text, short_names

_SHOWN = 12  # trials of the table at the end
_WIDTH, _ALWAYS = 100, 6  # characters; columns before the settings


def write_files(recipe: Recipe, space: Space, folder: Path, trials: Sequence[Trial]) -> list[Path]:
    """Write them into the sweep's folder. Returns those that are worth sending on."""
    best = pareto.best(space, trials)
    assert best is not None
    with writing("Sweep", folder):
        write_whole(folder / "trials.csv", trials_csv(trials, space))
        write_whole(folder / "best.yaml", best_yaml(recipe, space, folder, best))
        about = {
            "trial": best.number, "params": best.params, "values": best.values, "feasible": best.feasible,
            "metrics": best.metrics, "model": str(best.folder / "model"),
            "pareto_set": [trial.number for trial in pareto.pareto_set(space, trials)],
        }  # fmt: skip
        write_whole(folder / "best.json", json.dumps(about, indent=2))
        figures = _figures(space, folder, trials)
        for name, image in figures.items():
            (folder / f"{name}.png").write_bytes(image)
        write_whole(folder / "report.html", _report(recipe, space, folder, trials, figures))
    names = ["trials.csv", "best.yaml", "best.json", "report.html", *(f"{name}.png" for name in figures)]
    return [folder / name for name in names]


def best_yaml(recipe: Recipe, space: Space, folder: Path, best: Trial) -> str:
    """The best trial's whole recipe, its seed included, for unlearn.py."""
    chosen = recipe_of(recipe, best.params).model_dump(mode="json")
    told = [  # a line each, whatever was typed
        f"The best of sweep {folder.name}: {best.name}, {', '.join(_values(space, best))}"
        + ("" if best.feasible else ", though conditions are missed"),
        f"made by: {command()}",
        f"searched: {json.dumps(best.params)}",
        f"run it: python pipelines/unlearn.py {folder / 'best.yaml'}",
    ]
    comments = "".join(f"# {' '.join(line.split())}\n" for line in told)
    return comments + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)


def _values(space: Space, trial: Trial) -> list[str]:
    return [f"{goal_name(space, i)} = {value:.6g}" for i, value in enumerate(trial.values)]


def summary_text(space: Space, folder: Path, trials: Sequence[Trial]) -> str:
    """Pareto table, what decides, the best and where everything is, for the terminal."""
    best = pareto.best(space, trials)
    assert best is not None
    names = short_names(list(space.space))
    rows = _rows(space, trials)
    counted = {state: sum(t.state == state for t in trials) for state in ("finished", "stopped", "failed")}
    blocks = [
        ", ".join(f"{count} {state}" for state, count in counted.items() if count),
        _fitting(_header(space), rows),
    ]
    if found := importances(space, trials):
        blocks.append("decides      " + "  ".join(f"{names[path]} {share:.0%}" for path, share in found.items()))
    goals = "\n             ".join(_values(space, best))
    blocks.append(f"best         {best.name}: {goals}\n             {settings_text(names, best.params)}")
    if not best.feasible:
        blocks.append(f"             no trial meets {' and '.join(space.subject_to)}")
    places = {
        "report": folder / "report.html", "trials": folder / "trials.csv",
        "run it": f"python pipelines/unlearn.py {folder / 'best.yaml'}",
    }  # fmt: skip
    blocks.append("\n".join(f"{key:<12} {value}" for key, value in places.items()))
    return "\n\n".join(blocks)


def _fitting(header: list[str], rows: list[list[str]]) -> str:
    """The first trials, with as many settings as a terminal holds side by side."""
    columns = len(header)
    while columns > _ALWAYS and len(table(header[:columns], [row[:columns] for row in rows]).splitlines()[1]) > _WIDTH:
        columns -= 1
    text = table(header[:columns], [row[:columns] for row in rows[:_SHOWN]])
    left_out = [f"{len(rows) - _SHOWN} trials"] if len(rows) > _SHOWN else []
    left_out += [", ".join(header[columns:])] if columns < len(header) else []
    return f"{text}\nin trials.csv, too: {'; '.join(left_out)}" if left_out else text


def _header(space: Space) -> list[str]:
    names = short_names(list(space.space))
    goals = ["value"] if len(space.goals) == 1 else ["goal 1", "goal 2"]
    return ["trial", "Pareto", "holds", *goals, "forget p", "utility", *names.values()]


def _rows(space: Space, trials: Sequence[Trial]) -> list[list[str]]:
    front = {trial.number for trial in pareto.pareto_set(space, trials)}
    rows = []
    for trial in pareto.in_order(space, trials):
        params = [setting_text(trial.params.get(path)) for path in space.space]
        metrics = [number(trial.metrics.get(name)) for name in ("forget_probability", "model_utility")]
        marks = ["*" if trial.number in front else "", "yes" if trial.feasible else "no"]
        rows.append([str(trial.number), *marks, *map(number, trial.values), *metrics, *params])
    return rows


def _figures(space: Space, folder: Path, trials: Sequence[Trial]) -> dict[str, bytes]:
    models = json.loads((folder / "shared.json").read_text(encoding="utf-8"))["metrics"]
    names = short_names(list(space.space))
    drawn = {
        "trade-off": plots.trade_off(space, trials, models),
        "importance": plots.importance(importances(space, trials), names),
        "parallel": plots.parallel(space, trials, names),
    }
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}


def _report(recipe: Recipe, space: Space, folder: Path, trials: Sequence[Trial], figures: dict[str, bytes]) -> str:
    ended = [[t.name, t.state, t.reason or f"at step {t.steps}"] for t in trials if t.state in ("stopped", "failed")]
    facts = [
        ["recipe", f"{recipe.name}, seed {recipe.seed}"],
        ["command", command()],
        *[[f"goal {i + 1}", goal_name(space, i)] for i in range(len(space.goals))],
        *[["subject to", text] for text in space.subject_to],
        ["search", f"{space.search.type}, seed {space.search.seed}, scheduler {space.scheduler.type}"],
        *[[path, f"{about.kind} {about.values}"] for path, about in space.space.items()],
    ]
    blocks = [
        f"<h1>{html.escape(folder.name)}</h1>",
        images(list(figures.items())),
        "<h2>Trials</h2><p>The best first; * is in the Pareto set.</p>",
        html_table([_header(space)], _rows(space, trials), "numbers"),
        "<h2>Not finished</h2>" + html_table([["trial", "state", ""]], ended) if ended else "",
        "<h2>How this was made</h2>" + html_table([], facts),
    ]
    return page(folder.name, blocks, "body { max-width: 70rem; }")
