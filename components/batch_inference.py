"""Run a model over many rows: on Ray Data actors, or here."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from components.cluster import node_told
from components.config import Train
from components.errors import stall_told
from components.models import quiet_libraries

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
    import ray.data

    numbered = [batch.append_column("batch", pa.array([i] * batch.num_rows)) for i, batch in enumerate(batches)]
    size = min(train.workers, len(batches))
    mapped = ray.data.from_arrow(numbered).map_batches(
        _Worker,
        fn_constructor_args=(make, arguments, train.gpus_per_worker),
        batch_size=None,  # one block is one batch
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=size),
    )
    mapped.context.execution_no_progress_timeout_s = _PATIENCE
    mapped.context.raise_original_map_exception = True  # else Ray keeps only the text of ours
    with stall_told("Scoring", _PATIENCE):
        results = pa.concat_tables(ray.get(mapped.to_arrow_refs()))
    return [results.take(np.argsort(results["batch"].to_numpy(), kind="stable")).drop_columns("batch")]


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
    import ray.data

    # Given as they are, without a task to read them: the actors may hold all CPUs.
    numbers = [{"part": part} for part in range(count)]
    parts: Any = ray.data.from_items(numbers, override_num_blocks=min(count, 1000)).map_batches(
        _PartWorker,
        fn_constructor_args=(make, arguments, train.gpus_per_worker),
        batch_size=1,
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(train.workers, count)),
    )
    parts.context.execution_no_progress_timeout_s = _PATIENCE
    parts.context.raise_original_map_exception = True
    with stall_told("The original model's pass over the rows", _PATIENCE):
        for batch in parts.iter_batches(batch_size=None):
            yield from batch["size"].tolist()


def hide_gpus() -> None:
    """Keep a worker that reserved no GPU off the machine's: Ray does not, and DeepSpeed takes what it sees."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"


@node_told()
def _made_in_worker(make: Any, arguments: tuple[Any, ...], gpus: int) -> Any:
    if not gpus:
        hide_gpus()
    quiet_libraries()
    return make(*arguments)


class _Worker:
    def __init__(self, make: Any, arguments: tuple[Any, ...], gpus: int):
        self.function = _made_in_worker(make, arguments, gpus)

    @node_told()
    def __call__(self, batch: pa.Table) -> pa.Table:
        result = self.function(batch.drop_columns("batch"))
        return result.append_column("batch", pa.array([batch["batch"][0].as_py()] * result.num_rows))


class _PartWorker:
    def __init__(self, make: Any, arguments: tuple[Any, ...], gpus: int):
        self.function = _made_in_worker(make, arguments, gpus)

    @node_told()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"size": np.array([self.function(int(part)) for part in batch["part"]])}
