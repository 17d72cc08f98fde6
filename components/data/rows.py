"""Random access to prepared rows: memory-mapped, so that a set may be larger than memory."""

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from components.files import map_arrow

_OPEN_SHARDS = 512


class PreparedRows:
    """The good rows of a prepared folder, in the order of their sources, less those named in the file `without`."""

    def __init__(self, folder: Path, without: Path | None = None):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self._folder = folder
        self._names = [name for name, _ in summary["shards"]]
        self._ends = np.cumsum([count for _, count in summary["shards"]], dtype=np.int64)
        left_out = np.load(without) if without else np.empty(0, dtype=np.int64)
        # Row i of those left is row i + (number of left-out rows before it) of all.
        self._gaps = left_out - np.arange(len(left_out))
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return (int(self._ends[-1]) if len(self._ends) else 0) - len(self._gaps)

    def prompt(self, i: int) -> np.ndarray:
        """[prompt tokens] ids, special tokens in front included."""
        ids, start = self._row(i)
        return ids[:start]

    def answer(self, i: int) -> np.ndarray:
        """[answer tokens] ids, EOS included."""
        ids, start = self._row(i)
        return ids[start:]

    def lengths(self, i: int) -> tuple[int, int]:
        """Tokens of prompt and answer."""
        ids, start = self._row(i)
        return start, len(ids) - start

    def row_id(self, i: int) -> str:
        """Hash of the row's prompt and answer."""
        shard, place = self._find(i)
        return self._shard(shard)[3][place].as_py()

    def lines(self) -> np.ndarray:
        """[rows] the number of the record behind each row, counted from 1 within its file."""
        found = [read_shard(self._folder, name)["line"].to_numpy() for name in self._names]
        return np.concatenate(found)[self._at(np.arange(len(self)))] if found else np.empty(0, dtype=np.int64)

    def table(self) -> pa.Table:
        """All rows at once, with all columns: for sets that are known to be small."""
        tables = [read_shard(self._folder, name) for name in self._names]
        whole = pa.concat_tables(tables)
        return whole.take(self._at(np.arange(len(self)))) if len(self._gaps) else whole

    def _at(self, i: np.ndarray) -> np.ndarray:
        return i + np.searchsorted(self._gaps, i, side="right")

    def _find(self, i: int) -> tuple[int, int]:
        row = int(self._at(np.asarray(i)))
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - (int(self._ends[shard - 1]) if shard else 0)

    def _row(self, i: int) -> tuple[np.ndarray, int]:
        shard, place = self._find(i)
        values, offsets, starts, _ = self._shard(shard)
        return values[offsets[place] : offsets[place + 1]], int(starts[place])

    def _open_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, pa.Array]:
        table = read_shard(self._folder, self._names[shard])
        ids = table["input_ids"].chunk(0)
        starts, row_ids = table["answer_start"].chunk(0).to_numpy(), table["row_id"].chunk(0)
        return ids.values.to_numpy(), ids.offsets.to_numpy(), starts, row_ids


def read_shard(folder: Path, name: str) -> pa.Table:
    """One file of rows, memory-mapped."""
    return map_arrow(folder / "rows" / f"{name}.arrow")


def shard_names(folder: Path) -> list[str]:
    """The files of a prepared folder, in order."""
    return [name for name, _ in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["shards"]]
