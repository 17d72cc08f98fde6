"""Run several methods on one benchmark and show them in one table.

    python pipelines/compare.py pipelines/recipes/comparisons/demo.yaml [section.field=value ...] [--into FILE.md]

A comparison names recipes, its columns (such as optimizers) and its rows (methods), each with the settings that are its
own. Every cell is a run of unlearn.py in a process of its own; finished ones are found again. With --into, the table
also takes the place of what stands between the two comment lines `<!-- comparison -->` in a Markdown file.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from components.config import Recipe, Section
from components.console import number, table
from components.errors import ConfigError, Stopped, TrainingError
from components.files import read_lines, write_whole
from components.load_config import read_yaml
from pipelines.cli import exit_code, leave, parse_arguments, parsed, say
from pipelines.finetune import inputs_digest
from pipelines.unlearn import run_folder

_MARK = "<!-- comparison -->"
_WARM_UP = 2  # steps that are not timed


class Row(Section):
    """A method."""

    recipe: str | None = None
    """Recipe over the comparison's, relative to its file."""
    columns: dict[str, list[str]] = Field(min_length=1)
    """Settings under each column in which it stands."""


class Comparison(Section):
    """Methods × columns on one benchmark."""

    recipes: list[str] = Field(min_length=1)
    """Recipes that all runs share, relative to the comparison's file."""
    settings: list[str] = Field(default=[])
    """Settings that all runs share."""
    columns: dict[str, list[str]] = Field(min_length=1)
    """Settings of each column."""
    rows: dict[str, Row] = Field(min_length=1)


class Cell(NamedTuple):
    """One run."""

    row: str
    column: str
    arguments: list[str]
    """What unlearn.py is called with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is missing, print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="YAML file")
    parser.add_argument("settings", nargs="*", metavar="section.field=value", help="for all runs; later ones win")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="Markdown file that holds the table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parsed(parser, argv)
    return exit_code(lambda: _compare(options), options.debug)


def _compare(options: argparse.Namespace) -> None:
    cells = cells_of(options.comparison, options.settings)
    if options.into and (not options.into.is_file() or options.into.read_text(encoding="utf-8").count(_MARK) != 2):
        raise ConfigError(f"{options.into} is no file with two lines {_MARK}, between which the table would stand.")
    recipes = [parse_arguments(cell.arguments).recipe for cell in cells]  # all mistakes before the first run
    if options.dry_run:
        print("\n".join(" ".join(["python pipelines/unlearn.py", *cell.arguments]) for cell in cells))
        return
    results = []
    for i, (cell, recipe) in enumerate(zip(cells, recipes, strict=True)):
        say(f"[{i + 1}/{len(cells)}] {cell.row} with {cell.column}")
        results.append(_result(cell, recipe))
    say("\n" + table(HEADER, results))
    if options.into:
        before, _, after = options.into.read_text(encoding="utf-8").split(_MARK)
        write_whole(options.into, f"{before}{_MARK}\n{_markdown(HEADER, results)}\n{_MARK}{after}")


def cells_of(file: Path, settings: Sequence[str]) -> list[Cell]:
    """The runs of a comparison, row by row.

    Raises:
        ConfigError: when the file is not a comparison, or a row names a column that it has not.
    """
    try:
        comparison = Comparison.model_validate(read_yaml(file, "comparison"))
    except ValidationError as error:
        raise ConfigError(f"{file} is not a comparison: {error}") from None
    unknown = {name for row in comparison.rows.values() for name in row.columns} - {*comparison.columns}
    if unknown:
        raise ConfigError(f"{file}: rows name columns {sorted(unknown)}, which are not among {[*comparison.columns]}.")
    return [
        Cell(name, column, _arguments(file.parent, comparison, row, column, settings))
        for name, row in comparison.rows.items()
        for column in row.columns
    ]


def _arguments(folder: Path, comparison: Comparison, row: Row, column: str, settings: Sequence[str]) -> list[str]:
    recipes = comparison.recipes + ([row.recipe] if row.recipe else [])
    files = [os.path.normpath(folder / recipe) for recipe in recipes]
    return [*files, *comparison.settings, *comparison.columns[column], *row.columns[column], *settings]


HEADER = (
    "method", "optimizer", "forget_quality", "utility", "forget p", "retain p", "forget loss", "normal loss",
    "ms/step", "MiB",
)  # fmt: skip


def _result(cell: Cell, recipe: Recipe) -> list[str]:
    """A line of the table; the run is made when it is not there."""
    code, told = _unlearn(cell.arguments)
    if code:
        raise TrainingError(
            f"Run failed (row={cell.row}, column={cell.column}): {told} Run it by itself: "
            f"python pipelines/unlearn.py {' '.join(cell.arguments)}"
        )
    folder = run_folder(recipe, inputs_digest(recipe))
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]["unlearned"]
    lines = read_lines(folder / "metrics.jsonl")
    return [cell.row, cell.column, *(number(metrics.get(name)) for name in _METRICS), *_course(lines)]


def _unlearn(arguments: list[str]) -> tuple[int, str]:
    """Run unlearn.py. Returns its exit code and the end of what it printed on stderr.

    Raises:
        Stopped: when it or this process was asked to stop; the request is passed on, and an end in order waited for.
    """
    command = [sys.executable, str(Path(__file__).with_name("unlearn.py")), *arguments]
    asked = None
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        while True:
            try:
                told = process.communicate()[1].strip()[-500:]
                break
            except Stopped as stop:
                asked = stop.signal
                process.send_signal(asked)
    if asked or process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        raise Stopped(told or "Stopped.", asked or process.returncode - 128)
    return process.returncode, told


_METRICS = ("forget_quality", "model_utility", "forget_probability", "retain_probability")


def _course(lines: list[dict[str, Any]]) -> list[str]:
    """First and last losses, mean time of a step and largest memory."""
    first, last = lines[0], lines[-1]
    forget = "train/forget_loss" if "train/forget_loss" in first else "train/random_loss"
    losses = [
        f"{number(first[key])} → {number(last[key])}" if key in first else "-" for key in (forget, "train/normal_loss")
    ]
    timed = lines[_WARM_UP:] or lines
    seconds = sum(line["perf/step_seconds"] for line in timed) / len(timed)
    memory = max(line["perf/memory_gib"] for line in lines) * 1024
    return [*losses, f"{1000 * seconds:.0f}", f"{memory:.0f}"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---", "---", *(["---:"] * (len(header) - 2))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, aligned, *rows))


if __name__ == "__main__":
    leave(main())
