"""Names of the forget rows that a tokenizer has as tokens of their own: traces that no training of a model removes."""

import functools
import json
import re
from pathlib import Path

import numpy as np

from components.data.prepare import Prepared
from components.data.rows import read_shard, shard_names

_WORD = re.compile(r"[^\W\d_]+")


def names_as_tokens(forget: Prepared, normal: Prepared | None) -> list[str]:
    """Names in the forget rows that are single tokens, and whose tokens no normal row uses; in alphabetical order.

    A name is a word of two and more letters that is not written in small ones. A tokenizer that was trained on the
    rows to forget has such tokens, and so has every model made with it, one that never saw those rows included. A
    tokenizer of the world's text has them for names that are common.
    """
    return list(_names(forget.folder, normal.folder if normal else None))


@functools.lru_cache(maxsize=4)
def _names(forget: Path, normal: Path | None) -> tuple[str, ...]:
    from tokenizers import Tokenizer

    own = np.setdiff1d(_used(forget), _used(normal) if normal else [])
    settings = json.loads((forget / "settings.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str(settings["tokenizer"]["json"])
    tokens = {name for i in own if len(name := tokenizer.decode([int(i)]).strip()) > 1 and not name.islower()}
    words: set[str] = set()
    for shard in shard_names(forget) if tokens else ():
        for ids in read_shard(forget, shard)["input_ids"].to_pylist():
            words |= tokens & {*_WORD.findall(tokenizer.decode(ids))}
    return tuple(sorted(words))


def _used(folder: Path) -> np.ndarray:
    """Ids of the tokens that a prepared set's rows consist of."""
    found = [
        np.unique(read_shard(folder, name)["input_ids"].combine_chunks().flatten()) for name in shard_names(folder)
    ]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
