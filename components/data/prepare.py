"""Sources → validated, tokenised rows, made once by Ray Data and found again by the hash of what made them.

A prepared folder holds `rows/*.arrow` (see `rows.py`), `quarantine/*.jsonl` (each row set aside, with file, line,
reason and text), `summary.json` (counts) and `settings.json` (tokenizer and format that were used).
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from components.cluster import node_told
from components.config import Data, PoolSource, digest
from components.console import rows_line
from components.data import locations
from components.data.mapping import Unusable
from components.data.prompts import Encoder, TokenizerFacts
from components.data.sources import fingerprint, source_files
from components.data.tokenise import data_settings, read_chunks, tokenise_chunk
from components.errors import DataError, stall_told
from components.files import whole_folder

Kind = Literal["pairs", "answers", "questions"]
"""pairs: prompt with one answer, for training. answers: the pool of random responses. questions: a prompt with a
right answer, its paraphrase and wrong answers, for evaluation."""

Chunks = Generator[dict[str, Any], None, None]
"""What `tokenise_chunk` says of each chunk."""

_FORMAT = 4  # raise when the columns or their meaning change: old folders are then made anew
_HOPELESS = 10_000  # rows without a good one among them: a wrong column is told before the whole set is read
_TELL_EVERY = 3.0  # seconds


class Prepared(NamedTuple):
    """A folder of prepared rows and how many they are."""

    folder: Path
    digest: str
    good: int
    bad: int


def prepare(
    sources: Sequence[PoolSource],
    kind: Kind,
    data: Data,
    tokenizer: TokenizerFacts,
    storage: Path,
    *,
    need: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenise `sources` with Ray Data, or find the rows of an earlier run with the same content and settings.

    With `need`, reading stops when the first so many good rows are there. `tell` gets a line of progress every few
    seconds.

    Raises:
        DataError: when a source is missing, holds no usable row, or more than `data.max_bad_fraction` bad ones.
        ClusterError: when Ray gives preparation no CPU.
    """
    key = prepared_digest(sources, kind, data, tokenizer, storage, need=need)
    folder = storage / "prepared" / key
    if not (folder / "summary.json").exists():
        _write(sources, kind, data, tokenizer, folder, need, tell or (lambda line: None))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    prepared = Prepared(folder, key, summary["good"], summary["bad"])
    _check(prepared, summary, sources, data)
    return prepared


def prepared_digest(
    sources: Sequence[PoolSource], kind: Kind, data: Data, tokenizer: TokenizerFacts, storage: Path, *,
    need: int | None = None,
) -> str:  # fmt: skip
    """The name of the folder that `prepare` would make: changes with whatever changes a row."""
    return digest(
        {
            "format": _FORMAT,
            "kind": kind,
            "content": [fingerprint(source, storage) for source in sources],
            "mapping": [source.model_dump(mode="json") for source in sources],
            "data": data_settings(data),
            "tokenizer": digest(list(tokenizer), 64),
            "need": need,
        },
        32,
    )


def summary_of(prepared: Prepared) -> dict[str, Any]:
    """Counts of a prepared set: good, bad and filtered rows, bad ones by reason, tokens, longest prompt and answer."""
    return json.loads((prepared.folder / "summary.json").read_text(encoding="utf-8"))


def _write(
    sources: Sequence[PoolSource], kind: Kind, data: Data, tokenizer: TokenizerFacts, folder: Path, need: int | None,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Read and tokenise with Ray Data; a prepared folder is whole or absent, whoever else prepares it too."""
    # Found here, on the driver, so that a missing file is told at once and without a worker's traceback.
    files = [
        {"place": f"{i:03d}-{j:06d}", "source": source.model_dump_json(), "file": file}
        for i, source in enumerate(sources)
        for j, file in enumerate(source_files(source))
    ]
    try:
        Encoder(tokenizer, data_settings(data))
    except Unusable as reason:
        raise DataError(
            f"Chat template cannot be used (data.system={data.system}): {reason}. Expected one that writes the text of "
            "each message. Set data.template or data.chat_variables, or leave out data.system."
        ) from None
    with whole_folder(folder) as partial:
        (partial / "rows").mkdir()
        (partial / "quarantine").mkdir()
        settings = {"kind": kind, "tokenizer": tokenizer._asdict(), "data": data_settings(data)}
        (partial / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        chunks = _chunks(files, partial)
        summary = _summed_up([file["place"] for file in files], chunks, _sizes(files), need, tell)
        if not summary["good"] and summary["bad"] > _HOPELESS:
            unusable = folder.with_name(f"{folder.name}.unusable")
            shutil.rmtree(unusable, ignore_errors=True)
            shutil.move(partial, unusable)
            _check(Prepared(unusable, "", 0, summary["bad"]), summary, sources, data)
        _remove_others(partial, summary.pop("chunks"))
        (partial / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _remove_others(folder: Path, chunks: list[str]) -> None:
    """Delete what was read ahead of the rows that were needed."""
    kept = set(chunks)
    for part in ("rows", "quarantine"):
        for file in (folder / part).iterdir():
            if file.stem not in kept:
                file.unlink()


def _chunks(files: list[dict[str, str]], folder: Path) -> Chunks:
    """What `tokenise_chunk` says of each chunk, in the order in which they are done."""
    import ray.data

    dataset: Any = ray.data.from_items(files, override_num_blocks=min(len(files), 1000))
    # Different CPU shares keep Ray from fusing the two, so that one long file is read once and tokenised widely. Ray
    # lets each of the two have about half of the CPUs while both run: half a CPU a task makes all of them busy
    # tokenising, and the limit on their number keeps it from twice as many when all is read.
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    dataset = dataset.map_batches(_read, batch_size=1, num_cpus=0.25)
    dataset = dataset.map_batches(
        _tokenise, batch_size=1, batch_format="pyarrow", fn_args=(str(folder),), num_cpus=0.5,
        compute=ray.data.TaskPoolStrategy(size=cpus),
    )  # fmt: skip
    dataset.context.raise_original_map_exception = True  # else Ray keeps only the text of ours
    dataset.context.target_max_block_size = 1 << 24  # a chunk or two: work is shared out evenly, memory stays small
    with stall_told("Preparing data", dataset.context.execution_no_progress_timeout_s):
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()


def _read(batch: dict[str, Any]) -> Iterator[pa.Table]:
    with node_told():
        yield from read_chunks(batch)


@node_told()
def _tokenise(batch: pa.Table, folder: str) -> pa.Table:
    return tokenise_chunk(batch, folder)


def _summed_up(
    places: list[str], chunks: Chunks, sizes: dict[str, int], need: int | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Counts over all chunks, or over the first ones that hold `need` good rows."""
    done: dict[str, dict[str, Any]] = {}
    in_order: list[str] = []  # names of chunks before which none is missing: what is counted does not depend on timing
    waiting = iter(places)
    place, number, good, bad, rows = next(waiting), 0, 0, 0, 0
    read = dict.fromkeys(places, 0.0)
    started = told = time.monotonic()
    with closing(chunks):
        for chunk in chunks:
            rows += chunk["good"] + chunk["bad"] + chunk["filtered"]
            done[chunk["name"]] = chunk
            read[chunk["place"]] = -1.0 if chunk["fraction"] < 0 else max(read[chunk["place"]], chunk["fraction"])
            while (need is None or good < need) and (name := f"{place}-{number:06d}") in done:
                in_order.append(name)
                good, bad = good + done[name]["good"], bad + done[name]["bad"]
                place, number = (next(waiting, ""), 0) if done[name]["last"] else (place, number + 1)
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                tell(rows_line(rows, told - started, _share(read, sizes, need, good)))
            if (need is not None and good >= need) or (bad > _HOPELESS and not good):
                break
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("reasons", "requests", "requests_set_aside")}
    for name in in_order:
        for key, counter in counts.items():
            counter.update(json.loads(done[name][key]))
    chosen = [done[name] for name in in_order]
    return {
        **{key: sum(chunk[key] for chunk in chosen) for key in ("good", "bad", "filtered", "tokens")},
        **{key: max((chunk[key] for chunk in chosen), default=0) for key in ("longest_prompt", "longest_answer")},
        **{key: dict(counter.most_common()) for key, counter in counts.items()},
        "chunks": in_order,
        "shards": [[chunk["name"], chunk["good"]] for chunk in chosen if chunk["good"]],
    }


def _sizes(files: list[dict[str, str]]) -> dict[str, int]:
    """What each file counts for in the progress: its bytes, where it is a file on this machine."""
    return {f["place"]: locations.size(f["file"]) if Path(f["file"]).is_file() else 1 for f in files}


def _share(read: dict[str, float], sizes: dict[str, int], need: int | None, good: int) -> float | None:
    if any(fraction < 0 for fraction in read.values()):
        return None
    share = sum(fraction * sizes[place] for place, fraction in read.items()) / max(1, sum(sizes.values()))
    return max(share, min(1.0, good / need)) if need else share


def _check(prepared: Prepared, summary: dict[str, Any], sources: Sequence[PoolSource], data: Data) -> None:
    names = ", ".join(name for source in sources for name in source_files(source))
    names = names if len(names) < 300 else names[:300] + " …"
    total = prepared.good + prepared.bad
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(summary["reasons"].items())[:5])
    if not total:
        by = "data.requests" if any(getattr(source, "requested", None) for source in sources) else "where"
        left_out = f", left out by {by}={summary['filtered']}" if summary["filtered"] else ""
        raise DataError(f"Data is empty (files={names}{left_out}). Expected at least one row.")
    if not prepared.good or prepared.bad / total > data.max_bad_fraction:
        raise DataError(
            f"{prepared.bad} of {total} rows are unusable (files={names}): {reasons}. Expected at most "
            f"{data.max_bad_fraction:.1%}. They are listed in {prepared.folder / 'quarantine'}; mend them, check the "
            "prompt and answer columns, or raise data.max_bad_fraction."
        )
