"""Search a recipe's settings: unlearn.py over a tune space, the best trade-off, and a best.yaml that runs as it is.

    python pipelines/tune.py pipelines/recipes/demo.yaml tune_spaces/demo.yaml [section.field=value ...] [--dry-run]

Data, original and retain-only models, the original's reference pass and the baseline are made once and found again;
trials share them. Overrides that begin with a section of the space (search.trials=4) are for the space. The same
command goes on with a sweep that was stopped, and shows one that is finished.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from components.console import duration
from components.errors import ConfigError, TrainingError
from components.files import only_one, read_lines, write_whole, writing
from components.tuning import pareto
from components.tuning.search import next_point, planned_trials
from components.tuning.spaces import load_sweep, sweep_name
from components.tuning.trials import Sweep, Trial, goal_name, trials_csv
from pipelines.cli import exit_code, leave, parsed, ray_session, say, storage_folder
from pipelines.finetune import check_plan, count_rows, planned_steps
from pipelines.sweeps.outcome import summary_text, write_files
from pipelines.sweeps.shared import tidy


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, then search or, with --dry-run, print the plan. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "RECIPE.yaml, SPACE.yaml, section.field=value; later ones win"
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print trials and estimated time, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parsed(parser, argv)

    def act() -> None:
        sweep = parse(options.arguments)
        if options.dry_run:
            say(plan(sweep))
        else:
            run(sweep)

    return exit_code(act, options.debug)


def parse(arguments: Sequence[str]) -> Sweep:
    """The sweep that a command line names.

    Raises:
        ConfigError: naming every mistake in recipe and space.
    """
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if strange := [file for file in files if not file.endswith((".yaml", ".yml"))]:
        raise ConfigError(f"Argument not understood ({' '.join(strange)}). Expected a recipe, a space and overrides.")
    recipe, space, name = load_sweep(files, overrides)
    return Sweep(recipe, space, storage_folder(recipe) / "sweeps" / sweep_name(recipe, space, name))


def plan(sweep: Sweep) -> str:
    """Trials, their estimated time, and where, for --dry-run."""
    recipe, space = sweep.recipe, sweep.space
    check_plan(recipe)
    count = planned_trials(space, sweep.settings)
    steps = planned_steps(recipe.train, count_rows(recipe.data.forget))
    done = [trial for trial in sweep.trials() if trial.state == "finished"]
    each = sum(sum(trial.seconds.values()) for trial in done) / len(done) if done else _like_it(sweep, steps)
    at_once = f"{space.concurrent} at once" if space.concurrent else "as many at once as the cluster holds"
    total = f"; one after the other {duration(count * each)}" if each else ""
    lines = [
        f"sweep     {sweep.folder}",
        f"searched  {', '.join(space.space)}",
        f"trials    {count} of {steps or 'unknown'} steps, {at_once}, {len(done)} done; search {space.search.type}, "
        f"scheduler {space.scheduler.type}",
        f"time      {f'{duration(each)} a trial' if each else 'unknown until a trial or a run like it is done'}{total}",
        *(f"goal      {goal_name(space, place)}" for place in range(len(space.goals))),
        *(f"          subject to {text}" for text in space.subject_to),
    ]
    return "\n".join(lines)


def _like_it(sweep: Sweep, steps: int | None) -> float | None:
    """Seconds that runs of this recipe took a step, times the steps."""
    for file in sorted(storage_folder(sweep.recipe).glob(f"*-{sweep.recipe.name}-*/metrics.jsonl")):
        if steps and (lines := read_lines(file)):
            return steps * sum(line.get("perf/step_seconds", 0) for line in lines) / len(lines)
    return None


def run(sweep: Sweep) -> None:
    """Make what trials share, run those that are missing, and show what came of all."""
    started = time.perf_counter()
    with writing("Sweep", sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
    say(f"sweep        {sweep.folder}")
    with only_one(sweep.folder):
        count = planned_trials(sweep.space, sweep.settings)
        if not count:
            raise ConfigError("The grid has no point that is a recipe and meets the constraints. Change grid or space.")
        known = sweep.trials()
        tidy(sweep, known)
        ended = sum(trial.state != "running" for trial in known)
        if known:
            going_on = f", {len(known) - ended} are gone on with" if ended < count else ""
            say(f"trials       {ended} of {count} are done{going_on}")
        if ended < count:
            _search(sweep, count)
        trials = sweep.trials()
        _refuse_without_result(sweep, trials)
        files = write_files(sweep.recipe, sweep.space, sweep.folder, trials)
        _tell_mlflow(sweep, files)
    say("\n" + summary_text(sweep.space, sweep.folder, trials))
    say(f"\nall in {duration(time.perf_counter() - started)}")


def _refuse_without_result(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Where no trial finished, leave the table of all, and raise."""
    if any(trial.state == "finished" for trial in trials):
        return
    counts = ", ".join(f"{state}={sum(t.state == state for t in trials)}" for state in ("stopped", "failed"))
    table = sweep.folder / "trials.csv"
    write_whole(table, trials_csv(trials, sweep.space))
    raise TrainingError(
        f"No trial came to its end (folder={sweep.folder}, {counts}). Expected at least one. Look at the reasons in "
        f"{table}; widen the space, or raise scheduler.grace."
    )


def _tell_mlflow(sweep: Sweep, files: Sequence[Path]) -> None:
    from pipelines.sweeps.mlflow_log import Log

    trials = sweep.trials()
    best = pareto.best(sweep.space, trials)
    with Log(sweep.recipe, sweep.folder) as log:
        log.end(sweep.space, trials, files)
        if best and best.feasible:
            from pipelines.sweeps.candidate import offer

            if (best.folder / "model").exists():
                offer(sweep, best, log.spool(best))
            else:  # with two goals, trials after it may have made it the best
                say(f"candidate    none: the model of {best.name} is not kept any more; best.yaml makes it again")


def _search(sweep: Sweep, count: int) -> None:
    from pipelines.finetune import check_inputs
    from pipelines.sweeps.driver import concurrency, run_trials
    from pipelines.sweeps.mlflow_log import Log
    from pipelines.sweeps.shared import make_shared

    check_inputs(sweep.recipe)
    known = sweep.trials()
    if len(known) < count:
        next_point(sweep.space, sweep.settings, known, len(known))  # constraints that nothing meets are told now
    with Log(sweep.recipe, sweep.folder) as log:  # a new database takes as long as Ray's start: both at once
        log.begin(sweep.space)
        with ray_session(storage_folder(sweep.recipe)):
            at_once = concurrency(sweep)
            make_shared(sweep)
            run_trials(sweep, count, at_once, log)
        trials = sweep.trials()
        tidy(sweep, trials)
        for trial in trials:
            if trial.state == "failed":
                say(f"failed       {trial.name}: {trial.reason}")
        _refuse_without_result(sweep, trials)  # here, so that MLflow hears of it


if __name__ == "__main__":
    leave(main())
