import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from components.config import Files, HuggingFace, Text
from components.data import locations, sources
from components.data.mapping import Unusable, examples, parse
from components.data.sources import fingerprint, open_records, read_records, source_files
from components.errors import DataError

ROWS = [{"question": "a?", "answer": "b ü"}, {"question": "c?", "answer": 'd, "e"'}]


def fields(record) -> dict:
    return parse(record)


def reason(record) -> str:
    try:
        parse(record)
    except Unusable as unusable:
        return str(unusable)
    return ""


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
    assert [fields(record) for record in records] == ROWS
    assert all(record.error is None for record in records)
    assert [fields(record) for record in read(files(tmp_path / name, limit=1))] == ROWS[:1]


def test_saved_hugging_face_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "hf")
    source = HuggingFace(type="huggingface", path=str(tmp_path / "hf"))
    assert [fields(record) for record in read(source)] == ROWS


def test_hub_out_of_reach_is_one_paragraph() -> None:
    with pytest.raises(DataError, match=r"Data set cannot be loaded \(path=nobody/nothing"):
        read(HuggingFace(type="huggingface", path="nobody/nothing"))


def test_broken_lines_keep_their_place_and_reason(tmp_path: Path) -> None:
    lines = [b'{"a": "1"}', b"", b"{broken", b'["no", "object"]', b'{"a": "\xff"}', b'{"a": "2"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    records = read(files(tmp_path / "x.jsonl"))
    reasons = {1: "", 3: "not JSON", 4: "not a JSON object", 5: "not UTF-8", 6: ""}
    assert {record.line: reason(record).split(":")[0] for record in records} == reasons


def test_csv_rows_of_another_width_are_bad(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer\na,b\nc\nd,e,f\n")
    assert [record.error is None for record in read(files(tmp_path / "x.csv"))] == [True, False, False]


def test_a_quote_that_is_never_closed_sets_aside_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CSV_LINES", 50)
    lines = ["question,answer", *(f"q{i},a{i}" for i in range(1000)), '"two\nlines",fine', "last,one"]
    lines[5], lines[700] = 'q4,"oops', 'q699,"a"b'
    (tmp_path / "x.csv").write_text("\n".join(lines))
    records = read(files(tmp_path / "x.csv"))
    assert [(r.line, r.data) for r in records if r.error] == [(6, b'q4,"oops'), (701, b'q699,"a"b')]
    good = [fields(r) for r in records if not r.error]
    assert len(good) == 1000
    assert good[-2:] == [{"question": "two\nlines", "answer": "fine"}, {"question": "last", "answer": "one"}]
    assert records[-1].line == 1004


def test_a_damaged_first_line_does_not_make_json_lines_an_array(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('["a", "b"]\n{"question": "q"}')
    assert [reason(r) for r in read(files(tmp_path / "x.jsonl"))] == ["not a JSON object", ""]


def test_binary_columns_are_text_and_what_is_not_utf8_is_found(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = pa.array([b"Wo?", b"\xff"], pa.binary())
    claimed = pa.Array.from_buffers(pa.string(), 2, written.buffers())  # a text column that holds other bytes
    table = pa.table({"question": written, "answer": claimed, "day": pa.array([1, 2], pa.date32())})
    pq.write_table(table, tmp_path / "x.parquet")
    first, second = (fields(r) for r in read(files(tmp_path / "x.parquet")))
    assert first == {"question": "Wo?", "answer": "Wo?", "day": "1970-01-02"}
    with pytest.raises(Unusable, match="'question' is not valid Unicode"):
        examples(second, files("x"), "pairs")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_a_damaged_gz_is_told(tmp_path: Path, name: str) -> None:
    whole = bytearray(gzip.compress(b'{"question": "q"}\n' * 1000))
    whole[20:24] = b"\xff\xff\xff\xff"
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read"):
        read(files(tmp_path / name))


def test_odd_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "book.jsonl").rename(tmp_path / "book [1].jsonl")
    assert source_files(files(path)) == source_files(files("~/book [1].jsonl")) == [str(path)]
    with pytest.raises(DataError, match=r"cannot be read \(path=.*: Is a directory"):
        read(Text(type="text", path=str(tmp_path)))


def test_a_texts_limit_is_of_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\nthree\n")
    [block] = read(Text(type="text", path=str(tmp_path / "x.txt"), limit=2))
    assert fields(block) == {"text": "one\ntwo\n"}


def test_a_csv_row_that_is_not_utf8_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"question,answer\na,b\nc,\xff\ne,f\n")
    rows = [fields(record) for record in read(files(tmp_path / "x.csv"))]
    assert [row["question"] for row in rows] == ["a", "c", "e"]
    with pytest.raises(Unusable, match="'answer' is not valid Unicode"):
        examples(rows[1], files(tmp_path / "x.csv"), "pairs")


def test_lines_are_records_whatever_the_suffix_says(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"I do not know.\n\nNo \xff.\nNo idea.")
    records = read(files(tmp_path / "x.jsonl", format="lines"))
    assert [(r.line, reason(r)) for r in records] == [(1, ""), (3, "not UTF-8"), (4, "")]
    assert fields(records[2]) == {"text": "No idea."}


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_plain_text_comes_in_blocks_of_whole_lines(tmp_path: Path, name: str) -> None:
    lines = [f"line {i} {'x' * 50}\n".encode() for i in range(5000)]
    damaged = [*lines[:1000], b"bad \xff\n", *lines[1000:]]
    content = b"".join(damaged)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = read(Text(type="text", path=str(tmp_path / name)))
    assert [(r.line, r.data) for r in records if r.error] == [(1001, b"bad \xff\n")]
    blocks = [r for r in records if not r.error]
    assert "".join(fields(r)["text"] for r in blocks).encode() == b"".join(lines)
    assert 3 < len(blocks) < 10
    assert fields(blocks[1])["text"].startswith(
        f"line {blocks[1].line - 2 if blocks[1].line > 1001 else blocks[1].line - 1} "
    )


def test_the_share_read_is_known_for_every_format(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"):
        reading = open_records(files(write(tmp_path / name)), str(tmp_path / name))
        assert len(list(reading.records)) == 2
        assert reading.fraction() == 1.0


def test_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    assert [fields(r)["name"] for r in read(files(tmp_path / "*.jsonl"))] == ["a", "b"]
    assert [fields(r)["name"] for r in read(files([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]))] == [
        "b",
        "a",
    ]
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
    before = fingerprint(files(path), tmp_path)
    assert before == fingerprint(files(path), tmp_path)
    path.write_text(path.read_text() + "\n{}")
    assert before != fingerprint(files(path), tmp_path)


def test_a_large_file_is_hashed_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_HASH_AGAIN_BELOW", 10)
    path = write(tmp_path / "x.jsonl")
    before = fingerprint(files(path), tmp_path)
    with monkeypatch.context() as still:
        still.setattr(locations, "sha256", lambda file: pytest.fail("hashed again"))
        assert fingerprint(files(path), tmp_path) == before
    path.write_text(path.read_text().replace("a?", "z?"))
    assert fingerprint(files(path), tmp_path) != before


def test_s3_gives_the_same_records_as_the_disk(tmp_path: Path, bucket: Any) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e.json"):
        with bucket.open_output_stream(f"bucket/data/{name}", compression=None) as stream:
            stream.write(write(tmp_path / name).read_bytes())
        assert [fields(r) for r in read(files(f"s3://bucket/data/{name}"))] == ROWS, name
    with bucket.open_output_stream("bucket/odd/a#1?.jsonl") as stream:
        stream.write(b"{}")
    assert source_files(files("s3://bucket/odd/*")) == ["s3://bucket/odd/a#1?.jsonl"]
    assert len(read(files("s3://bucket/odd/*"))) == 1
    assert source_files(files("s3://bucket/data/*.jsonl*")) == [
        "s3://bucket/data/a.jsonl",
        "s3://bucket/data/b.jsonl.gz",
    ]
    with bucket.open_output_stream("bucket/book.txt") as stream:
        stream.write(b"Once upon a time.\n")
    [block] = read(Text(type="text", path="s3://bucket/book.txt"))
    assert fields(block) == {"text": "Once upon a time.\n"}


def test_s3_fingerprint_follows_the_object(tmp_path: Path, bucket: Any) -> None:
    def put(content: bytes) -> str:
        with bucket.open_output_stream("bucket/x.jsonl") as stream:
            stream.write(content)
        return fingerprint(files("s3://bucket/x.jsonl"), tmp_path)

    first = put(b"{}")
    assert fingerprint(files("s3://bucket/x.jsonl"), tmp_path) == first
    assert put(b"{ }") != first


def test_what_is_wrong_with_a_bucket_is_told(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"not found \(path=s3://bucket/none"):
        source_files(files("s3://bucket/none*.jsonl"))
    with pytest.raises(DataError, match="unknown kind of store"):
        source_files(files("ftp://bucket/x.jsonl"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    locations._connect.cache_clear()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be reached \(path=s3://bucket/x\.jsonl"):
        source_files(files("s3://bucket/x.jsonl"))
    assert time.monotonic() - started < 30
