"""Run a model over many rows: on Ray Data actors, or here."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.cluster import node_told
from components.config import Train
from components.errors import stall_told
from components.models import quiet_libraries
from components.process import keep_private

_PATIENCE = 900  # seconds: a large model's loading and first batch take long


def map_batches(
    rows: pa.Table, make: Callable[..., Callable[[pa.Table], pa.Table]], arguments: tuple[Any, ...], *,
    lengths: Any, batch_size: int, train: Train,
) -> pa.Table:  # fmt: skip
    """`make(*arguments)` once per worker, then its call on batches of `rows`; results in the order of `rows`.

    Rows of similar `lengths` share a batch, so that little is padded. The composition of the batches does not depend
    on the number of workers (`train.workers`; 0 runs here).
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]  # longest first: memory trouble shows at once
    batches = [rows.take(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if train.workers == 0:
        quiet_libraries()
        function = make(*arguments)
        results = [function(batch) for batch in batches]
    else:
        results = _on_ray(batches, make, arguments, train)
    return pa.concat_tables(results).take(np.argsort(order))


def _on_ray(batches: list[pa.Table], make: Any, arguments: tuple[Any, ...], train: Train) -> list[pa.Table]:
    packed = [_packed(batch) for batch in batches]
    with stall_told("Scoring", _PATIENCE):
        results = dict(_over_items(packed, _OnTables, (make, arguments), train))
    return [_unpacked(results[place]) for place in range(len(batches))]


def run_parts(
    count: int, make: Callable[..., Callable[[int], int]], arguments: tuple[Any, ...], train: Train
) -> Iterator[int]:
    """`make(*arguments)` once per worker, then its call on each of the part numbers below `count`.

    For results that the workers write themselves; yields what the calls return, in the order in which they end.
    """
    if train.workers == 0:
        quiet_libraries()
        function = make(*arguments)
        yield from (function(part) for part in range(count))
        return
    with stall_told("The original model's pass over the rows", _PATIENCE):
        yield from (size for _, size in _over_items(range(count), make, arguments, train))


def _over_items(items: Sequence[Any], make: Any, arguments: tuple[Any, ...], train: Train) -> Iterator[tuple[int, Any]]:
    """Yield (place, `make(*arguments)(item)`) of each item in the order in which they end.

    An item is one row of a Ray data set. Ray Data splits and merges rows as it likes, and with GPUs it insists on
    batches of its own making, so nothing that must stay whole may be spread over several rows.
    """
    import ray.data

    # Given as they are, without a task to read them: the actors may hold all CPUs.
    rows = [{"place": place, "item": item} for place, item in enumerate(items)]
    results: Any = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map_batches(
        _Worker,
        fn_constructor_args=(make, arguments, train.gpus_per_worker),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(train.workers, len(rows))),
    )
    results.context.execution_no_progress_timeout_s = _PATIENCE
    results.context.raise_original_map_exception = True  # else Ray keeps only the text of ours
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from zip(batch["place"].to_pylist(), batch["result"].to_pylist(), strict=True)


def hide_gpus() -> None:
    """Keep a worker that reserved no GPU off the machine's: Ray does not, and DeepSpeed takes what it sees."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"


class _Worker:
    """A Ray Data actor: one item in, one result out."""

    @node_told()
    def __init__(self, make: Any, arguments: tuple[Any, ...], gpus: int):
        keep_private()
        if not gpus:
            hide_gpus()
        quiet_libraries()
        self.function = make(*arguments)

    @node_told()
    def __call__(self, batch: pa.Table) -> pa.Table:
        result = self.function(batch["item"][0].as_py())
        return pa.table({"place": batch["place"], "result": [result]})


class _OnTables:
    """`make(*arguments)`, a function of tables, as a function of tables in bytes."""

    def __init__(self, make: Any, arguments: tuple[Any, ...]):
        self.function = make(*arguments)

    def __call__(self, packed: bytes) -> bytes:
        return _packed(self.function(_unpacked(packed)))


def _packed(table: pa.Table) -> bytes:
    """The table in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(packed: bytes) -> pa.Table:
    """The table that `_packed` packed."""
    return pa.ipc.open_stream(packed).read_all()
