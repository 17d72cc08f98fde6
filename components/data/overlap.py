"""Rows that stand in both forget and normal: what is to be forgotten must not be kept at the same time."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    found = json.loads((folder / "summary.json").read_text())
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
    known = {key: _column(forget, key) for key in ("row_id", "match")}
    rows: list[np.ndarray] = []
    places: list[str] = []
    exact = first = 0
    for name in shard_names(normal.folder):
        table = read_shard(normal.folder, name)
        alike = pc.is_in(table["match"], known["match"])
        exact += pc.sum(pc.is_in(table["row_id"], known["row_id"])).as_py() or 0
        here = np.flatnonzero(alike.to_numpy())
        places += [f"source {int(name[:3]) + 1}, line {table['line'][int(i)]}" for i in here[: 3 - len(places)]]
        rows.append(first + here)
        first += len(table)
    both = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    with whole_folder(folder) as partial:
        np.save(partial / "rows.npy", both)
        summary: dict[str, Any] = {"exact": exact, "alike": len(both) - exact, "places": "; ".join(places)}
        (partial / "summary.json").write_text(json.dumps(summary))


def _column(prepared: Prepared, column: str) -> pa.Array:
    chunks = [read_shard(prepared.folder, name)[column] for name in shard_names(prepared.folder)]
    return pa.concat_arrays([chunk for column_chunks in chunks for chunk in column_chunks.chunks])
