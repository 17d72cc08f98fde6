"""A large made-up set, and what preparing it costs: shared by the memory test and the benchmark.

    python -m tests.scale [ROWS]

prints rows per second of `pipelines/prepare.py` and their ratio to the bare fast tokenizer on the same CPUs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import yaml

from components.config import Scratch
from components.models import load_tokenizer, make_scratch, quiet_libraries, tokenizer_facts

ROOT = Path(__file__).resolve().parents[1]
_WORDS_A_ROW = 80


def texts(rows: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Questions of 15 and answers of 65 words, drawn as language draws them: few words often, very many rarely."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = np.array(["".join(rng.choice(syllables, size=rng.integers(1, 5))) for _ in range(100_000)])
    for first in range(0, rows, 10_000):
        ranks = rng.zipf(1.3, size=(min(10_000, rows - first), _WORDS_A_ROW)) % len(words)
        for i, row in enumerate(words[ranks].tolist()):
            yield {"question": f"{first + i} {' '.join(row[:15])}?", "answer": " ".join(row[15:])}


def write_set(folder: Path, rows: int) -> Path:
    """`rows` rows as JSON lines, a tokenizer of 8,000 tokens, and a recipe; returns the recipe."""
    with (folder / "normal.jsonl").open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in texts(rows))
    (folder / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    sample = [text for row in texts(3000) for text in row.values()]
    base = make_scratch(Scratch(type="scratch", vocabulary=8000, hidden_size=8, heads=2, layers=1), sample, 0, folder)
    recipe = {
        "name": "scale", "storage": str(folder / "runs"),
        "data": {
            "forget": [{"type": "files", "path": str(folder / "forget.jsonl")}],
            "normal": [{"type": "files", "path": str(folder / "normal.jsonl")}],
        },
        "models": {"original": {"type": "pretrained", "path": str(base)}},
        "objective": {"forget": {"type": "gradient_ascent"}, "normal": {"type": "nll"}},
    }  # fmt: skip
    (folder / "scale.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "scale.yaml"


def prepare(recipe: Path) -> tuple[str, float, dict[str, list[int]]]:
    """Run the command; its output, seconds, and the private memory [bytes] of driver and workers over time."""
    started = time.monotonic()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(ROOT / "pipelines" / "prepare.py"), str(recipe), "--show", "0"]
    memory: dict[str, list[int]] = defaultdict(list)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            memory["driver"].append(driver.memory_info().rss)
            named = [(_name(process), process) for process in driver.children(recursive=True)]
            for task in ("read_chunks", "tokenise_chunk"):
                memory[task].append(max((_private(process) for name, process in named if task in name), default=0))
            time.sleep(0.2)
        assert run.stdout is not None
        output = run.stdout.read()
    assert run.returncode == 0, output
    return output, time.monotonic() - started, memory


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _private(process: psutil.Process) -> int:
    """Without the object store, which all workers share."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return memory.rss - memory.shared


def bare_rows_per_second(recipe: Path, rows: int) -> float:
    """The tokenizer alone, on all CPUs, over texts that are in memory already."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    base = yaml.safe_load(recipe.read_text())["models"]["original"]["path"]
    tokenizer = Tokenizer.from_str(tokenizer_facts(load_tokenizer(Path(base))).json)
    whole = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in texts(rows)]
    started = time.monotonic()
    for first in range(0, rows, 1024):
        [encoding.ids for encoding in tokenizer.encode_batch_fast(whole[first : first + 1024])]
    return rows / (time.monotonic() - started)


def main(rows: int) -> None:
    """Print the benchmark's figures."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_set(Path(folder), rows)
        size = (Path(folder) / "normal.jsonl").stat().st_size
        bare = bare_rows_per_second(recipe, min(rows, 100_000))
        _, seconds, memory = prepare(recipe)
        again = bare_rows_per_second(recipe, min(rows, 100_000))
    print(f"{rows:,} rows, {size / 2**30:.2f} GiB of JSON lines, {os.cpu_count()} CPUs")
    print(f"prepare.py        {rows / seconds:8,.0f} rows/s, {seconds:.0f} s with the start of Ray")
    print(f"bare tokenizer    {bare:8,.0f} rows/s before, {again:,.0f} after")
    print(f"ratio             {2 * rows / seconds / (bare + again):8.2f}")
    for name, course in memory.items():
        print(f"{name:<17} {max(course) / 2**20:8,.0f} MiB at most")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
