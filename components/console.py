"""What a person sees: progress lines, tables that fit a terminal, short numbers."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any


def number(value: float | None) -> str:
    """Three significant digits; very small values as a power of ten."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m10s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def utc(seconds: float | None = None) -> str:
    """A time in seconds since 1970, by default now, as 2026-01-31T23:59:59Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def rows_line(rows: int, seconds: float, share: float | None) -> str:
    """Progress of a pass over rows: how many, how fast and, where the `share` done is known, how long it will take."""
    line = f"{rows:,} rows  {rows / seconds:,.0f} rows/s"
    return line + (f"  {share:.0%}  left {duration(seconds / share - seconds)}" if share else "")


def progress_line(line: Mapping[str, Any], tokens_per_second: float, step_seconds: float) -> str:
    """One line of metrics.jsonl for the console: step, each term, gradient norm, clip fraction, speed, time left."""
    parts = [f"step {line['step']:>{len(str(line['steps']))}}/{line['steps']}"]
    shown = {
        "train/forget_loss": "forget", "train/random_loss": "random", "train/normal_loss": "normal",
        "train/normal_weight": "weight", "train/grad_norm": "grad", "train/gradient_cosine": "cos",
        "train/clip_fraction": "clip",
    }  # fmt: skip
    parts += [f"{name} {line[key]:.3f}" for key, name in shown.items() if key in line]
    parts.append(f"{tokens_per_second:.0f} tok/s")
    parts.append(f"left {duration((line['steps'] - line['step']) * step_seconds)}")
    return "  ".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Inside, nothing reaches the terminal by the file descriptor of stderr, as C++ and subprocesses write to it."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stderr(nothing):
        kept = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
