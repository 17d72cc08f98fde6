"""Open a data file as UTF-8 text: decompress and decode it, or say what it is instead."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from components.data import locations
from components.errors import DataError

_HEAD = 512  # bytes that tell what a file is
_BUFFER = 1 << 20
PACKED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_FOREIGN = {
    b"version https://git-lfs": "a pointer of git-lfs in place of the file: run git lfs pull",
    b"PK\x03\x04": "a zip archive, or an Excel or NumPy file, which are such: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save it as CSV",
    b"SQLite format 3\0": "an SQLite database: export the table as CSV",
    b"Obj\x01": "an Avro file: save it as Parquet",
    b"ORC": "an ORC file: save it as Parquet",
    b"FEA1": "a Feather file of version 1: save it as Parquet",
    b"\x89HDF": "an HDF5 file: save it as Parquet",
    b"\x93NUMPY": "a NumPy array: save it as JSON lines",
    b"%PDF": "a PDF: save its text",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x80\x02": "a pickle, which is never loaded: save it as Parquet",
    b"\x80\x03": "a pickle, which is never loaded: save it as Parquet",
    b"\x80\x04": "a pickle, which is never loaded: save it as Parquet",
    b"\x80\x05": "a pickle, which is never loaded: save it as Parquet",
}


def open_text(file: str) -> tuple[Any, Any]:
    """(buffered binary stream of the file's text in UTF-8, underlying file, whose position shows the progress).

    Compression is recognised by the first bytes or the suffix, UTF-16 and UTF-32 by their byte order mark.

    Raises:
        DataError: when the file cannot be opened or holds no text.
    """
    raw = locations.open_file(file)
    stream: Any = raw if hasattr(raw, "peek") else io.BufferedReader(raw, _BUFFER)
    packed = _packing(_head(stream)) or PurePosixPath(file).suffix.lower()
    return _decoded(_UNPACK[packed](stream) if packed in _UNPACK else stream, file), raw


@contextmanager
def reading(file: str, kind: str) -> Iterator[None]:
    """Turn what libraries raise on a damaged file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"Data file cannot be read (path={file}): {error}. Expected a whole {kind} file.") from error


def check_table(head: bytes, file: str, kind: str) -> None:
    """Raise DataError if the first bytes of a file show that it is no table of this kind (parquet, arrow)."""
    refuse_foreign(head, file, f"a {kind.capitalize()} file")
    if packed := _packing(head):
        raise _refusal(file, f"compressed ({packed}): decompress it", f"a {kind.capitalize()} file")
    if (found := table(head)) not in (None, kind):
        raise _refusal(file, f"of kind {found}: set the source's format", f"a {kind.capitalize()} file")


def refuse_foreign(head: bytes, file: str, expected: str) -> None:
    """Raise DataError if the first bytes of a file show a format that we do not read."""
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise _refusal(file, what, expected)
    if head[257:262] == b"ustar":
        raise _refusal(file, "a tar archive: unpack it", expected)


def table(head: bytes) -> str | None:
    """The table format (parquet, arrow) that the first bytes of a file show, or None."""
    return next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)


def looks_like(file: str) -> str | None:
    """The format (parquet, arrow, json) that the content of a file shows, or None; used without a known suffix."""
    with locations.open_file(file, random_access=True) as stream:
        if found := table(stream.read(8)):
            return found
    stream, raw = open_text(file)
    with raw:
        return "json" if _head(stream).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else None


def _head(stream: Any) -> bytes:
    return bytes(stream.peek(_HEAD)[:_HEAD])


def _packing(head: bytes) -> str | None:
    found = next((suffix for magic, suffix in PACKED.items() if head.startswith(magic)), None)
    return None if found == ".bz2" and head[4:10] != b"1AY&SY" else found  # "BZh" is text, too


def _unpack_zstandard(stream: Any) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"), _BUFFER)


_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unpack_zstandard,
}


def _decoded(stream: Any, file: str) -> Any:
    head = _head(stream)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding:
        return io.BufferedReader(_Utf8(stream, encoding), _BUFFER)
    refuse_foreign(head, file, "text in UTF-8")
    if found := table(head):
        raise _refusal(file, f"of kind {found}: set the source's format", "text in UTF-8")
    if head.count(0) * 4 >= len(head) > 0:
        raise _refusal(file, "binary, or UTF-16 without a byte order mark: save it as UTF-8", "text in UTF-8")
    return stream


def _refusal(file: str, what: str, expected: str) -> DataError:
    found, _, fix = what.partition(": ")
    return DataError(f"Data file is {found} (path={file}). Expected {expected}. {fix[:1].upper()}{fix[1:]}.")


class _Utf8(io.RawIOBase):
    """Text in another encoding as bytes of UTF-8; an invalid character spoils only its own line."""

    def __init__(self, stream: Any, encoding: str):
        self._stream, self._left = stream, b""
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and self._decoder:
            data = self._stream.read(_BUFFER)
            self._left = self._decoder.decode(data, not data).encode("utf-8", "surrogatepass")
            if not data:
                self._decoder = None
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
