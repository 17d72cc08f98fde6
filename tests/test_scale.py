"""Half a million rows through `pipelines/prepare.py`: memory stays where it is. `make bench-data` takes two million."""

from pathlib import Path

import pytest

from components.data.rows import PreparedRows
from tests.scale import prepare, write_set


@pytest.mark.long
def test_half_a_million_rows_need_no_more_memory_than_a_few(tmp_path: Path) -> None:
    recipe = write_set(tmp_path, 500_000)
    assert (tmp_path / "normal.jsonl").stat().st_size > 10**8 * 2.5
    output, _, memory = prepare(recipe)
    assert "\nnormal  500,000          0" in output
    assert max(memory["driver"]) < 1.5 * 2**30
    for task in ("read_chunks", "tokenise_chunk"):
        course = [size for size in memory[task] if size]
        third = len(course) // 3  # in the first one the process is still growing to its working size
        middle, late = course[third : 2 * third], course[2 * third :]
        assert max(late) < 1.2 * max(middle), (task, course)
        assert max(course) < 2**30
    [folder] = [f for f in (tmp_path / "runs" / "prepared").iterdir() if len(list((f / "rows").iterdir())) > 1]
    rows = PreparedRows(folder)
    assert len(rows) == 500_000
    assert len({rows.row_id(i) for i in range(0, 500_000, 9973)}) == len(range(0, 500_000, 9973))
