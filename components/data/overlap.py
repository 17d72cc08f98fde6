"""Rows that stand in both forget and normal: what is to be forgotten must not be kept at the same time."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.data.prepare import Prepared
from components.data.rows import read_shard, shard_names
from components.errors import DataError
from components.files import whole_folder


class Overlap(NamedTuple):
    """Normal rows that also stand in forget."""

    exact: int
    """Equal character for character."""
    alike: int
    """Equal but for letter case and spaces."""
    rows: Path
    """File with their indices among the normal rows, sorted: what `PreparedRows` leaves out."""


def find_overlap(forget: Prepared, normal: Prepared, choice: str, storage: Path) -> Overlap | None:
    """The overlap, None when there is none; memory holds the forget rows' hashes, whatever the size of normal.

    Raises:
        DataError: when there is one and `choice` (`data.overlap`) is error.
    """
    folder = storage / "overlap" / f"{forget.digest[:16]}-{normal.digest[:16]}"
    if not folder.exists():
        _write(forget, normal, folder)
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    overlap = Overlap(found["exact"], found["alike"], folder / "rows.npy")
    count = overlap.exact + overlap.alike
    if count and choice == "error":
        raise DataError(
            f"{count} normal row(s) stand in forget too (exactly: {overlap.exact}, but for letter case and spaces: "
            f"{overlap.alike}). Expected none: a row cannot be forgotten and kept. The first: {found['places']}. Take "
            "them out, or set data.overlap to drop_from_normal or keep."
        )
    return overlap if count else None


def _write(forget: Prepared, normal: Prepared, folder: Path) -> None:
    matches = np.sort(np.concatenate([read_shard(forget.folder, n)["match"] for n in shard_names(forget.folder)]))
    rows: list[np.ndarray] = []
    places: list[str] = []
    row_ids: list[str] = []
    first = 0
    for name in shard_names(normal.folder):
        table = read_shard(normal.folder, name)
        own = table["match"].to_numpy()
        at = np.minimum(np.searchsorted(matches, own), len(matches) - 1)
        here = np.flatnonzero(matches[at] == own)
        places += [f"source {int(name[:3]) + 1}, line {table['line'][int(i)]}" for i in here[: 3 - len(places)]]
        row_ids += table["row_id"].take(here).to_pylist()
        rows.append(first + here)
        first += len(table)
    exact = _count_in(forget, set(row_ids), row_ids)
    both = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    with whole_folder(folder) as partial:
        np.save(partial / "rows.npy", both)
        summary: dict[str, Any] = {"exact": exact, "alike": len(both) - exact, "places": "; ".join(places)}
        (partial / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def _count_in(prepared: Prepared, wanted: set[str], row_ids: list[str]) -> int:
    """How many of `row_ids` are among the rows of `prepared`."""
    found: set[str] = set()
    for name in shard_names(prepared.folder) if wanted else ():
        found |= wanted & set(read_shard(prepared.folder, name)["row_id"].to_pylist())
    return sum(row_id in found for row_id in row_ids)
