import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import Files, HuggingFace, Text
from components.data import locations, sources
from components.data.mapping import Unusable, examples, parse
from components.data.sources import fingerprint, open_records, read_records, source_files
from components.errors import DataError
from components.load_config import load_recipe

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "recipes" / "demo.yaml"
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


def test_brackets_and_folders_in_a_bucket(bucket: Any) -> None:
    for name in ("data [v1]/a.jsonl", "data [v1]/sub/b.jsonl", "data [v1]/out.parquet/part", "v/1.jsonl", "v/2.jsonl"):
        with bucket.open_output_stream(f"bucket/{name}") as stream:
            stream.write(b"{}")
    assert source_files(files("s3://bucket/data [v1]/*.jsonl")) == ["s3://bucket/data [v1]/a.jsonl"]
    assert source_files(files("s3://bucket/data [v1]/a.jsonl")) == ["s3://bucket/data [v1]/a.jsonl"]
    assert source_files(files("s3://bucket/v/[1]*")) == ["s3://bucket/v/1.jsonl"]
    assert source_files(files("s3://bucket/data [v1]/s*/*")) == ["s3://bucket/data [v1]/sub/b.jsonl"]
    for folder in ("data [v1]", "data [v1]/*", "data [v1]/*.parquet"):
        with pytest.raises(DataError, match=r"cannot be read \(path=s3://bucket/data .*: Is a directory"):
            source_files(files(f"s3://bucket/{folder}"))


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


# --- what a file is, by its name and its content ---------------------------------------------------------------------


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def _arrow(options: Any = None, *, stream: bool = False) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
COMMAS = 'question,answer\na?,b ü\nc?,"d, ""e"""\n'
READ = {
    "x.JSONL": LINES.encode(),
    "x.Json": json.dumps(ROWS).encode(),
    "x.CSV": COMMAS.encode(),
    "x.CSV.GZ": gzip.compress(COMMAS.encode()),
    "X.PARQUET": _parquet(),
    "semicolons.csv": 'question;answer\na?;b ü\nc?;"d, ""e"""'.encode(),
    "bars.csv": 'question|answer\r\na?|b ü\r\nc?|"d, ""e"""\r\n'.encode(),
    "tabs.csv": 'question\tanswer\ra?\tb ü\rc?\t"d, ""e"""\r'.encode(),
    "x.tsv": 'question\tanswer\na?\tb ü\nc?\td, "e"'.encode(),
    "x.tab.gz": gzip.compress('question\tanswer\na?\tb ü\nc?\td, "e"'.encode()),
    "excel.csv": ("sep=;\r\n" + COMMAS.replace("question,", "question;").replace("?,", "?;")).encode("utf-16"),
    "blank.csv": ("\n\n" + COMMAS).encode(),
    "utf16.csv": COMMAS.encode("utf-16"),
    "utf16be.tsv": codecs.BOM_UTF16_BE
    + COMMAS.replace("question,", "question\t").replace("?,", "?\t").encode("utf-16-be"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(LINES.encode("utf-16")),
    "utf32.json": json.dumps(ROWS).encode("utf-32"),
    "x.jsonl.bz2": bz2.compress(LINES.encode()),
    "x.csv.xz": lzma.compress(COMMAS.encode()),
    "x.jsonl.zst": _zstd(LINES.encode()),
    "members.jsonl.gz": b"".join(gzip.compress(line.encode() + b"\n") for line in LINES.split("\n")),
    "members.jsonl.zst": b"".join(_zstd(line.encode() + b"\n") for line in LINES.split("\n")),
    "members.jsonl.xz": b"".join(lzma.compress(line.encode() + b"\n") for line in LINES.split("\n")),
    "packed.jsonl": gzip.compress(LINES.encode()),
    "x.arrow": _arrow(),
    "stream.arrow": _arrow(stream=True),
    "x.feather": _arrow(pa.ipc.IpcWriteOptions(compression="zstd")),
    "3f2a9c": LINES.encode(),
    "3f2a9d": json.dumps(ROWS).encode(),
    "3f2a9e": _parquet(),
    "3f2a9f": _arrow(),
    "3f2aa0": gzip.compress(LINES.encode()),
    "records.v2": LINES.encode(),
    "pretty.json": PRETTY.encode(),
    "pretty-array.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": json.dumps(ROWS, indent=1).encode(),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_plain_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(READ[name])
    reading = open_records(files(tmp_path / name), source_files(files(tmp_path / name))[0])
    records = list(reading.records)
    assert [fields(record) for record in records] == ROWS
    assert reading.fraction() in (None, 1.0)
    assert [fields(record) for record in read(files(tmp_path / name, limit=1))] == ROWS[:1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, _zstd])
def test_books_may_be_packed_and_of_any_unicode(tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    text = "Ünder the 🌙.\r\n" * 9000
    (tmp_path / "book").write_bytes(pack(text.encode(encoding)))
    blocks = read(Text(type="text", path=str(tmp_path / "book")))
    assert "".join(fields(block)["text"] for block in blocks) == text
    assert len(blocks) > 1


def test_half_a_surrogate_pair_in_utf16_spoils_its_own_line(tmp_path: Path) -> None:
    text = '{"question": "a?"}\n{"question": "\ud83c"}\n{"question": "c?"}\n'
    (tmp_path / "x.jsonl").write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le", "surrogatepass"))
    assert [reason(record) for record in read(files(tmp_path / "x.jsonl"))] == ["", "not UTF-8", ""]


def _archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("x.csv", COMMAS)
    else:
        with tarfile.open(fileobj=sink, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("x.csv"), io.BytesIO(COMMAS.encode()))
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
REFUSED = {
    "zipped.csv": (_archive("zip"), "is a zip archive"),
    "x.xlsx": (_archive("zip"), "is a zip archive, or an Excel"),
    "x.csv.zip": (_archive("zip"), "is a zip archive"),
    "x.jsonl.tar.gz": (_archive("w:gz"), "is a tar archive"),
    "x.tar": (_archive("w"), "is a tar archive"),
    "x.db": (b"SQLite format 3\0" + bytes(99), "is an SQLite database"),
    "x.pkl": (b"\x80\x04\x95", "is a pickle, which is never loaded"),
    "lfs.jsonl": (LFS, "is a pointer of git-lfs"),
    "lfs.parquet": (LFS, "is a pointer of git-lfs"),
    "lfs.arrow": (LFS, "is a pointer of git-lfs"),
    "x.npy": (b"\x93NUMPY\1\0", "is a NumPy array"),
    "x.avro": (b"Obj\x01" + bytes(20), "is an Avro file"),
    "x.orc": (b"ORC" + bytes(20), "is an ORC file"),
    "parquet.csv": (_parquet(), "is of kind parquet"),
    "arrow.jsonl": (_arrow(), "is of kind arrow"),
    "stream.csv": (_arrow(stream=True), "is of kind arrow"),
    "arrow.parquet": (_arrow(), "is of kind arrow"),
    "parquet.arrow": (_parquet(), "is of kind parquet"),
    "x.parquet.gz": (gzip.compress(_parquet()), "is compressed"),
    "no-mark.csv": (COMMAS.encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "no-mark.jsonl": (LINES.encode("utf-16-be"), "UTF-16 without a byte order mark"),
    "x.bin": (bytes(range(256)), "unknown suffix"),
    "cut.jsonl.xz": (lzma.compress(LINES.encode())[:-9], "cannot be read"),
    "cut.jsonl.zst": (_zstd(LINES.encode() * 999)[:-9], "cannot be read"),
    "cut.csv.bz2": (bz2.compress(COMMAS.encode())[:-9], "cannot be read"),
    "cut.arrow": (_arrow()[:-99], "cannot be read"),
    "cut16.csv": (COMMAS.encode("utf-16")[:-1], "cannot be read"),
    "plain.jsonl.gz": (LINES.encode(), "cannot be read"),
    "deep.json": (b"[" * 100_000, "cannot be read"),
    "open.json": (b'[{"a": 1}, ', "cannot be read"),
    "more.json": (b'[{"a": 1}] [2]', "cannot be read"),
    "which.csv": (b"a;b\tc\n1;2\t3\n", "Separator of a CSV file cannot be told"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_what_it_is(tmp_path: Path, name: str) -> None:
    content, told = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        read(files(tmp_path / name))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{\n "question": "a?",\n "answer": "b"\n}\n', [{"question": "a?", "answer": "b"}]),
        ('\n\n{"a":\n{"b": 1}}', [{"a": {"b": 1}}]),
        ('{"a": 1, "b":\n [1,\n 2]}{"a": 2}', [{"a": 1, "b": [1, 2]}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}', [{"a": 1}]),
        ("[]", []),
        (" [ ] ", []),
        ('[{"a": 1.50}\n,{"a": 1e400}]', [{"a": 1.5}, {"a": float("inf")}]),
        ("{broken\n{}", ["not JSON", {}]),
        ("{broken\nbroken}", ["not JSON", "not JSON"]),
        ('[{"a": 1}, 2, null, {"a": 1, "a": 2}]', [{"a": 1}, *["not a JSON object"] * 2, "key 'a' is named twice"]),
        ('{\n"a": 1,\n"b": {"c": 1, "c": 2}\n}', ["key 'c' is named twice"]),
        ('{"a": 1, "a": 2}\n{"a": 1, "a": 2}', ["key 'a' is named twice"] * 2),
        (f'[{{"a": 1}}, {{"a": {"9" * 5000}}}]', [{"a": 1}, "not JSON"]),
    ],
)
def test_json_may_fill_the_file(tmp_path: Path, content: str, found: list[Any]) -> None:
    (tmp_path / "x.json").write_text(content)
    records = read(files(tmp_path / "x.json"))
    assert [reason(record).split(":")[0] or fields(record) for record in records] == found


def test_a_json_arrays_element_that_is_not_utf8_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"a": "1"}, {"a": "\xff"}, {"a": "\\ud83c"}]')
    assert [reason(record) for record in read(files(tmp_path / "x.json"))] == ["", "not UTF-8", ""]


# --- names and places ------------------------------------------------------------------------------------------------


def test_links_into_the_hubs_cache_are_read_by_their_own_names(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet")):
        os.rename(write(tmp_path / name), blobs / f"{i}f{i:038d}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i}f{i:038d}")
        assert source_files(files(snapshot / name)) == [str(snapshot / name)]
        assert [fields(record) for record in read(files(snapshot / name))] == ROWS
    assert len(read(files(snapshot / "*"))) == 10
    before = fingerprint(files(snapshot / "x.jsonl"), tmp_path)
    (blobs / f"0f{0:038d}").write_text("{}")
    assert fingerprint(files(snapshot / "x.jsonl"), tmp_path) != before


@pytest.mark.parametrize("folder", ["data [v1]", "what?", "a*b", "[!x]", "[[]"])
@pytest.mark.parametrize("pattern", ["x.jsonl", "*.jsonl", "[xy].jsonl", "**/x.*"])
def test_a_folders_name_is_no_glob(tmp_path: Path, folder: str, pattern: str) -> None:
    (tmp_path / folder).mkdir()
    path = write(tmp_path / folder / "x.jsonl")
    (tmp_path / "v").mkdir()
    write(tmp_path / "v" / "x.jsonl")
    assert source_files(files(f"{tmp_path}/{folder}/{pattern}")) == [str(path)]
    [source] = load_recipe(
        [DEMO], [f"data.forget=[{{type: files, path: '{pattern}'}}]", f"data.folder={tmp_path}/{folder}"]
    ).data.forget
    assert source_files(source) == [str(path)]


def test_brackets_are_a_choice_only_where_nothing_has_them(tmp_path: Path) -> None:
    for name in ("a [1].jsonl", "a [2].jsonl", "b1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [Path(file).name for file in source_files(files(tmp_path / "a [1]*"))] == ["a [1].jsonl"]
    assert [Path(file).name for file in source_files(files(tmp_path / "a [[]?].jsonl"))] == [
        "a [1].jsonl",
        "a [2].jsonl",
    ]
    assert [Path(file).name for file in source_files(files(tmp_path / "b[12].jsonl"))] == ["b1.jsonl"]


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to("../blobs/3f2a")
    (tmp_path / "round.jsonl").symlink_to("round.jsonl")
    (tmp_path / "chain.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "folder").symlink_to("nowhere")
    write(tmp_path / "whole.jsonl")
    for name in ("gone.jsonl", "round.jsonl", "chain.jsonl", "g*.jsonl", "*", "folder"):
        for ask in (source_files, lambda source: fingerprint(source, tmp_path)):
            with pytest.raises(DataError, match=r"is a link that leads nowhere \(path=.*, to="):
                ask(files(tmp_path / name))


def test_folders_among_the_matches(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl")
    (tmp_path / "archive").mkdir()
    inner = write(tmp_path / "archive" / "y.csv")
    assert source_files(files(tmp_path / "*")) == [str(path)]
    assert source_files(files(tmp_path / "**")) == [str(inner), str(path)]
    (tmp_path / "parts.jsonl").mkdir()
    for pattern in ("*.jsonl", "*", "parts.jsonl"):
        with pytest.raises(DataError, match=r"path=.*parts\.jsonl\): Is a directory"):
            source_files(files(tmp_path / pattern))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listening.bind("socket.jsonl")
        for name in (str(tmp_path / "pipe.jsonl"), str(tmp_path / "socket.jsonl"), "/dev/null"):
            with pytest.raises(DataError, match="a pipe, a device or a socket"):
                source_files(files(name))


def test_a_file_that_goes_away_is_told(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jsonl")
    for ask in (
        locations.open_file,
        locations.size,
        locations.state,
        lambda file: locations.content_digest(file, tmp_path),
    ):
        with pytest.raises(DataError, match=r"cannot be read \(path=.*gone"):
            ask(gone)


# --- a name twice ----------------------------------------------------------------------------------------------------

ONE = pa.array(["1"])
INNER = pa.StructArray.from_arrays([ONE, ONE], ["x", "x"])
TWICE = {
    "a": pa.table([ONE, ONE, ONE], ["a", "b", "a"]),
    "s.x": pa.table([ONE, INNER], ["a", "s"]),
    "l.x": pa.table([pa.array([[None]], pa.list_(INNER.type))], ["l"]),
    "s.t.x": pa.table([pa.StructArray.from_arrays([INNER], ["t"])], ["s"]),
    "l.t.x": pa.table([pa.array([[None]], pa.large_list(pa.struct({"t": pa.list_(INNER.type)})))], ["l"]),
}


@pytest.mark.parametrize("column", TWICE)
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "stream.arrow", "x.feather"])
def test_a_table_that_names_a_column_twice_is_refused(tmp_path: Path, column: str, name: str) -> None:
    table = TWICE[column]
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with (pa.ipc.new_stream if name == "stream.arrow" else pa.ipc.new_file)(
            tmp_path / name, table.schema
        ) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"names a column twice \(path=.*{name}, column={column}\)"):
        read(files(tmp_path / name))


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("question,answer,question", "question"),
        ('a,"b c","b c"', "b c"),
        ("\ufeffa,b,a", "a"),
        ("a;b;a", "a"),
        ("a\tb\tb", "b"),
    ],
)
def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path, header: str, column: str) -> None:
    (tmp_path / "x.csv").write_text(f"{header}\n1,2,3\n")
    (tmp_path / "x.csv").write_text(f"{header}\n" + header.replace(header[:1], "1"))
    with pytest.raises(DataError, match=rf"names a column twice \(path=.*x\.csv, column={column}\)"):
        read(files(tmp_path / "x.csv"))


def test_a_saved_folder_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"a": "1", "s": "2"}]).save_to_disk(tmp_path / "hf")
    [file] = (tmp_path / "hf").glob("*.arrow")
    for column in ("a", "s.x"):
        with pa.ipc.new_stream(file, TWICE[column].schema) as writer:
            writer.write_table(TWICE[column])
        with pytest.raises(DataError, match=rf"Data set cannot be loaded \(path=.*{column[-1]}"):
            read(HuggingFace(type="huggingface", path=str(tmp_path / "hf")))


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer,,\na,b,,\n")
    [record] = read(files(tmp_path / "x.csv"))
    assert fields(record) == {"question": "a", "answer": "b", "": ""}


# --- where every column is text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    ["safe == false", "safe != true", "safe in [true]", "not safe", "safe", "n == 1", "n > 1", "n == null", "n in [1]"],
)
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.CSV.gz"])
def test_a_filter_for_other_types_does_not_fit_csv(tmp_path: Path, where: str, name: str) -> None:
    content = f"safe{chr(9) if 'tsv' in name else ','}n\nFalse{chr(9) if 'tsv' in name else ','}1\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = files(tmp_path / name, where=where)
    with pytest.raises(DataError, match=r"every column is text \(path=.*x\.\w+.*\): column '(safe|n)' is text"):
        source_files(source)
    source_files(files(tmp_path / name, where="safe == 'False' and number(n) == 1"))
    with pytest.raises(DataError, match="every column is text"):
        source_files(files(write(tmp_path / "y.jsonl"), format="lines", where="text == 1"))
