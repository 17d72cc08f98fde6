"""Prepare a recipe's sets and show some of their rows, without a model's weights.

    python pipelines/prepare.py pipelines/recipes/demo.yaml [section.field=value ...] [--show N] [--dry-run]

Prints for each set how many rows there are, how many were set aside and why, and what stands in both forget and
normal. Answers are shown in brackets, their tokens parted by bars. What is prepared here is found again by unlearn.py.
"""

import argparse
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.config import Pretrained, Recipe
from components.console import table
from components.data.name_tokens import names_as_tokens
from components.data.overlap import Overlap, find_overlap
from components.data.prepare import Prepared, prepare, summary_of
from components.data.prompts import Encoder, TokenizerFacts, answer_tokens_marked
from components.data.requests import read_requests
from components.data.rows import PreparedRows
from components.data.tokenise import data_settings
from components.errors import DataError
from components.models import load_tokenizer, tokenizer_facts, tokenizer_folder
from pipelines.cli import Command, leave, ray_session, run_cli, say, storage_folder
from pipelines.finetune import base_folder, check_context, check_sources, count_rows, planned_steps
from pipelines.training import telling


class Streams(NamedTuple):
    """Prepared rows of the terms that the objective has."""

    forget: Prepared | None
    normal: Prepared | None
    random: Prepared | None
    overlap: Overlap | None
    """Normal rows that stand in forget too."""
    without: Path | None
    """File that names the normal rows to leave out."""
    unmet: list[str]
    """Ids of deletion requests that name no record."""

    def sets(self) -> dict[str, Prepared]:
        """Those that there are, by name."""
        named = {"forget": self.forget, "normal": self.normal, "random": self.random}
        return {name: prepared for name, prepared in named.items() if prepared}

    def places(self) -> dict[str, str]:
        """Folders of the sets and, as `normal_without`, the file of normal rows to leave out: as a job has them."""
        without = {"normal_without": str(self.without)} if self.without else {}
        return {**{name: str(prepared.folder) for name, prepared in self.sets().items()}, **without}


def run(command: Command) -> None:
    """Prepare the sets that the objective uses, sum them up and show rows."""
    recipe = command.recipe
    check_sources(recipe)
    storage = storage_folder(recipe)
    place = storage if recipe.data.cache else storage / f"prepared-once-{uuid.uuid4().hex[:8]}"
    with ray_session(storage):
        facts = _tokenizer(recipe)
        try:
            streams = prepare_streams(recipe, facts, place)
            say(described(streams))
            for name, prepared in streams.sets().items():
                if name == "forget" and recipe.data.requests:
                    say("\nforget rows are not shown, since deletion requests choose them and output may be kept")
                    continue
                for line in preview(prepared, Encoder(facts, data_settings(recipe.data)), command.options.show):
                    say(f"\n{name} {line}")
        finally:
            if not recipe.data.cache:
                shutil.rmtree(place, ignore_errors=True)


def plan(command: Command) -> str:
    """What would be read, for --dry-run."""
    data = command.recipe.data
    counts = {name: count_rows(getattr(data, name)) for name in ("forget", "normal", "random")}
    shown = ", ".join(f"{name} {'unknown' if count is None else count}" for name, count in counts.items())
    return f"\nPlan: records {shown}; prepared under {storage_folder(command.recipe) / 'prepared'}"


def prepare_streams(recipe: Recipe, facts: TokenizerFacts, place: Path) -> Streams:
    """Prepare under `place` what the objective uses, or find it there.

    Raises:
        DataError: when too many rows are bad, or rows stand in both forget and normal against `data.overlap`.
    """
    data, objective = recipe.data, recipe.objective
    forget = normal = pool = overlap = None
    if objective.forget or objective.random:
        forget = prepare(data.forget, "pairs", data, facts, place, tell=telling("forget"))
    if objective.normal:
        need = None if data.cache else _rows_needed(recipe, forget)
        normal = prepare(data.normal, "pairs", data, facts, place, need=need, tell=telling("normal"))
    if "random" in objective.groups():
        pool = prepare(data.random, "answers", data, facts, place, tell=telling("random"))
    if forget and normal:
        overlap = find_overlap(forget, normal, data.overlap, place)
    if forget and pool:
        _check_that_responses_fit(forget, pool, data.max_tokens)
        if data.responses == "by_row":
            _check_that_rows_belong_together(forget, pool)
    unmet = _check_requests(data.requests, forget, normal) if data.requests and forget else []
    without = overlap.rows if overlap and data.overlap == "drop_from_normal" else None
    if normal and without and not len(PreparedRows(normal.folder, without)):
        raise DataError("No normal row is left (data.overlap=drop_from_normal): all stand in forget too. Give others.")
    return Streams(forget, normal, pool, overlap, without, unmet)


def _check_requests(path: str, forget: Prepared, normal: Prepared | None) -> list[str]:
    """The requests that name no record; others must be met as a whole.

    Raises:
        DataError: when a record that a request names was set aside, or stands in normal only.
    """
    ids = [request.request_id for request in read_requests(path).requests]
    found, kept = summary_of(forget), summary_of(normal)["requests"] if normal else {}
    if aside := found["requests_set_aside"]:
        raise DataError(
            f"Records that deletion requests name cannot be used (requests={', '.join(aside)}). Expected to unlearn "
            f"all of them. They are listed in {forget.folder / 'quarantine'}; mend them, or take them out of the data."
        )
    if elsewhere := [name for name in ids if name in kept and name not in found["requests"]]:
        raise DataError(
            f"Records that deletion requests name stand in data.normal only (requests={', '.join(elsewhere)}). "
            "Expected to unlearn them. Name the same source under data.forget too."
        )
    return [name for name in ids if name not in found["requests"]]


def _check_that_responses_fit(forget: Prepared, pool: Prepared, max_tokens: int) -> None:
    longest = summary_of(forget)["longest_prompt"] + summary_of(pool)["longest_answer"]
    if longest > max_tokens:
        raise DataError(
            f"The longest random response does not fit behind the longest forget prompt (tokens={longest}). Expected "
            f"at most data.max_tokens={max_tokens}. Raise it or take shorter responses."
        )


def _check_that_rows_belong_together(forget: Prepared, pool: Prepared) -> None:
    own, other = PreparedRows(forget.folder).lines(), PreparedRows(pool.folder).lines()
    both = min(len(own), len(other))
    differing = np.flatnonzero(own[:both] != other[:both])
    if len(differing) or len(own) != len(other):
        first = int(differing[0]) if len(differing) else both
        raise DataError(
            f"Rows of random do not belong to those of forget one by one (forget={len(own)}, random={len(other)}, "
            f"first difference at row {first + 1}). Expected the same records in the same order, none set aside in "
            "only one. Name the same sources with another answer column, or set data.responses=drawn."
        )


def _rows_needed(recipe: Recipe, forget: Prepared | None) -> int | None:
    """Normal rows that the run uses when none is used twice."""
    steps = planned_steps(recipe.train, forget.good if forget else None)
    return steps * recipe.train.batch_size if steps else None


def described(streams: Streams) -> str:
    """A table of the sets, and what is to be known of rows set aside or standing in two sets."""
    keys = ["good", "bad", "filtered", "tokens", "longest_prompt", "longest_answer"]
    found = {name: summary_of(prepared) for name, prepared in streams.sets().items()}
    rows = [[name, *(f"{summary[key]:,}" for key in keys)] for name, summary in found.items()]
    header = ["set", "rows", "set aside", "filtered", "tokens", "longest prompt", "longest answer"]
    return "\n".join([table(header, rows), *notes(streams)])


def notes(streams: Streams) -> list[str]:
    """A line for each reason to set rows aside, where they are listed, the overlap, and names that are tokens."""
    lines = set_aside(streams.sets())
    if count := names_in_tokenizer(streams):
        lines.append(f"forget: {count} names are tokens of their own, which stay in the tokenizer of every model")
    lines += [f"forget: no record is named by request {name}" for name in streams.unmet]
    if both := streams.overlap:
        what = "left out" if streams.without else "kept"
        lines.append(
            f"normal: {both.exact} rows that stand in forget too and {both.alike} that differ in letter case or "
            f"spaces only: {what}"
        )
    return lines


def names_in_tokenizer(streams: Streams) -> int:
    """How many names of the forget rows the tokenizer has as tokens that no normal row uses."""
    return len(names_as_tokens(streams.forget, streams.normal)) if streams.forget else 0


def set_aside(sets: Mapping[str, Prepared]) -> list[str]:
    """A line for each reason to set rows aside, and where they are listed."""
    lines = []
    for name, prepared in sets.items():
        reasons = summary_of(prepared)["reasons"]
        lines += [f"{name}: {count} set aside: {reason}" for reason, count in reasons.items()]
        lines += [f"{name}: listed in {prepared.folder / 'quarantine'}"] if reasons else []
    return lines


def data_counts(streams: Streams) -> dict[str, float]:
    """Rows used, set aside and filtered of each set, for MLflow."""
    names = {"good": "", "bad": "_set_aside", "filtered": "_filtered"}
    return {
        f"{name}{shown}": summary_of(prepared)[key]
        for name, prepared in streams.sets().items()
        for key, shown in names.items()
    }


def preview(prepared: Prepared, encoder: Encoder, count: int) -> list[str]:
    """The first rows of a set as text, answer tokens marked."""
    rows = PreparedRows(prepared.folder)
    lines = []
    for i in range(min(count, len(rows))):
        prompt, answer = rows.prompt(i), rows.answer(i)
        sizes = f"prompt {len(prompt)} tokens, answer {len(answer)}"
        lines.append(f"row {i + 1}, {sizes}\n  {answer_tokens_marked(encoder, prompt.tolist(), answer.tolist())}")
    return lines


def _tokenizer(recipe: Recipe) -> TokenizerFacts:
    model = recipe.models.original or (recipe.finetune.base if recipe.finetune else None)
    assert model is not None  # the recipe's own check
    storage = storage_folder(recipe)
    folder = tokenizer_folder(model, storage) if isinstance(model, Pretrained) else base_folder(recipe)
    facts = tokenizer_facts(load_tokenizer(folder))
    check_context(recipe, folder)
    return facts


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show", type=int, default=2, metavar="N", help="rows of each set to show (default 2)")


if __name__ == "__main__":
    leave(run_cli(__doc__, run, plan, add_options=_options))
