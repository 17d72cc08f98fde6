import gzip
import json
from pathlib import Path

import pytest

from components.config import Files, HuggingFace
from components.data.sources import fingerprint, read_records, source_files
from components.errors import DataError

ROWS = [{"question": "a?", "answer": "b ü"}, {"question": "c?", "answer": 'd, "e"'}]


def files(path: Path | list[str] | str, **more) -> Files:
    return Files(type="files", path=path if isinstance(path, list) else str(path), **more)


def read(source) -> list:
    return [record for file in source_files(source) for record in read_records(source, file)]


def write(path: Path) -> Path:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    if path.suffixes == [".jsonl"]:
        path.write_text(text, encoding="utf-8")
    elif path.suffixes == [".jsonl", ".gz"]:
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffixes == [".json"]:
        path.write_text(json.dumps(ROWS))
    elif path.suffixes == [".csv"]:
        path.write_text('\ufeffquestion,answer\na?,b ü\nc?,"d, ""e"""\n', encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    records = read(files(write(tmp_path / name)))
    assert [record.fields for record in records] == ROWS
    assert all(record.error is None for record in records)
    assert [record.fields for record in read(files(tmp_path / name, limit=1))] == ROWS[:1]


def test_saved_hugging_face_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "hf")
    source = HuggingFace(type="huggingface", path=str(tmp_path / "hf"))
    assert [record.fields for record in read(source)] == ROWS


def test_hub_out_of_reach_is_one_paragraph() -> None:
    with pytest.raises(DataError, match=r"Data set cannot be loaded \(path=nobody/nothing"):
        read(HuggingFace(type="huggingface", path="nobody/nothing"))


def test_broken_lines_keep_their_place_and_reason(tmp_path: Path) -> None:
    lines = [b'{"a": "1"}', b"", b"{broken", b'["no", "object"]', b'{"a": "\xff"}', b'{"a": "2"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    records = read(files(tmp_path / "x.jsonl"))
    assert [(r.line, r.fields is not None) for r in records] == [
        (1, True),
        (3, False),
        (4, False),
        (5, False),
        (6, True),
    ]
    assert [r.error.split(":")[0] for r in records if r.error] == ["not JSON", "not a JSON object", "not UTF-8"]


def test_csv_rows_of_another_width_are_bad(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer\na,b\nc\nd,e,f\n")
    assert [record.error is None for record in read(files(tmp_path / "x.csv"))] == [True, False, False]


def test_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    assert [r.fields["name"] for r in read(files(tmp_path / "*.jsonl"))] == ["a", "b"]
    assert [r.fields["name"] for r in read(files([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]))] == ["b", "a"]
    with pytest.raises(DataError, match="not found"):
        source_files(files(tmp_path / "c.jsonl"))


def test_unreadable_files_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("?")
    with pytest.raises(DataError, match="unknown suffix"):
        read(files(tmp_path / "x.txt"))
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        read(files(tmp_path / "x.parquet"))


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl")
    before = fingerprint(files(path))
    assert before == fingerprint(files(path))
    path.write_text(path.read_text() + "\n{}")
    assert before != fingerprint(files(path))
