"""Data files on this machine or in an object store: find them, open them, tell their content apart."""

import functools
import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.files import sha256, write_whole

_HASH_AGAIN_BELOW = 1 << 20  # bytes; the digest of a larger file is remembered with its size and time


def find(patterns: str | list[str]) -> list[str]:
    """Absolute paths or URLs of the files that `patterns` name, each pattern's sorted.

    Raises:
        DataError: when a pattern matches nothing or something else than files, or its object store cannot be reached.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _find_remote(pattern) if is_remote(pattern) else _find_here(os.path.expanduser(pattern))
        if not matches:
            raise DataError(f"Data file not found (path={pattern}). Expected a file or a glob that matches one.")
        found += matches
    return found


def _find_here(path: str) -> list[str]:
    """Links keep their own names, since what they lead to may have none that says what it is (the hub's cache)."""
    if os.path.lexists(path):
        return [_file_here(path)]
    matches = sorted(glob.glob(_brackets_kept(path), recursive=True))
    matches = matches or sorted(glob.glob(path.replace("[", "[[]"), recursive=True))
    return [_file_here(match) for match in matches if not (os.path.isdir(match) and _passed_over(match, path))]


def _find_remote(url: str) -> list[str]:
    store, path = open_store(url)
    scheme = url.partition("://")[0]

    def ask(pattern: str) -> dict[str, Any]:
        return _ask(url, lambda: store.glob(pattern, detail=True))

    literal = path.replace("[", "[[]")
    matches = (ask(literal) if literal != path else {}) or ask(path)
    folders = {name for name, info in matches.items() if info["type"] == "directory"}
    for folder in sorted(folders):
        if folder.rstrip("/") == path.rstrip("/") or not _passed_over(folder, path):
            raise _not_a_file(f"{scheme}://{folder}")
    return [f"{scheme}://{match}" for match in sorted(matches) if match not in folders]


def _brackets_kept(path: str) -> str:
    """A glob in which those parts stand for themselves that are there: a folder `[v1]` is no choice of `v` and `1`."""
    parts = path.split("/")
    there = 0
    while there < len(parts) and os.path.lexists("/".join(parts[: there + 1]) or "/"):
        there += 1
    return "/".join([*map(glob.escape, parts[:there]), *parts[there:]])


def _passed_over(folder: str, pattern: str) -> bool:
    """Whether a glob means the files beside a folder, not the folder: `*` does, `*.jsonl` does not."""
    last = pattern.rpartition("/")[2]
    return last == "**" or not (os.path.splitext(folder.rstrip("/"))[1] or os.path.splitext(last)[1])


def _file_here(path: str) -> str:
    """The absolute path of a file that can be read, by its own name.

    Raises:
        DataError: saying what it is else.
    """
    path = os.path.abspath(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if not os.path.islink(path):
            raise _unreadable(path, error) from error
        raise DataError(
            f"Data file is a link that leads nowhere (path={path}, to={os.readlink(path)}): {error.strerror}. Expected "
            "a file. Restore what it leads to, such as by downloading it again."
        ) from error
    if stat.S_ISDIR(mode):
        raise _not_a_file(path)
    if not stat.S_ISREG(mode):
        raise DataError(
            f"Data file is a pipe, a device or a socket (path={path}). Expected a file, since it is read more than "
            "once. Save its content first."
        )
    return path


def _not_a_file(path: str) -> DataError:
    return DataError(
        f"Data file cannot be read (path={path}): Is a directory. Expected a file or a glob, such as "
        f"{path.rstrip('/')}/*.jsonl."
    )


def _unreadable(file: str, error: OSError) -> DataError:
    return DataError(f"Data file cannot be read (path={file}): {error.strerror or error}. Expected a readable file.")


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(file, error) from error


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of an object store."""
    return "://" in path


def open_file(file: str, *, random_access: bool = False) -> Any:
    """A binary file object; a remote one without random access is read ahead.

    Raises:
        DataError: when it cannot be opened.
    """
    if not is_remote(file):
        with _reading(file):
            return open(file, "rb")
    store, path = open_store(file)
    opener = (
        store.fs.open_input_file if random_access else functools.partial(store.fs.open_input_stream, compression=None)
    )
    return _ask(file, lambda: opener(path))


def size(file: str) -> int:
    """Bytes of one file."""
    if not is_remote(file):
        with _reading(file):
            return os.path.getsize(file)
    store, path = open_store(file)
    return int(_ask(file, lambda: store.info(path))["size"])


def state(file: str) -> str:
    """Size and time of the last change of one file."""
    if is_remote(file):
        store, path = open_store(file)
        info = _ask(file, lambda: store.info(path))
        return f"{info['size']} {info['mtime']}"
    with _reading(file):
        found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"


def content_digest(file: str, memory: Path) -> str:
    """Hex digest that changes with the file's content.

    A local file's bytes are hashed; for a large one the result is remembered under `memory` as long as size and time
    of change stay. An object in a store goes by its size and time of change.
    """
    if is_remote(file):
        return hashlib.sha256(f"{file} {state(file)}".encode()).hexdigest()
    if size(file) < _HASH_AGAIN_BELOW:
        return _digest(file)
    note = memory / hashlib.sha256(file.encode()).hexdigest()[:32]
    key = f"{file} {state(file)}"
    if note.exists() and note.read_text(encoding="utf-8").startswith(key + "\n"):
        return note.read_text(encoding="utf-8").splitlines()[1]
    digest = _digest(file)
    memory.mkdir(parents=True, exist_ok=True)
    write_whole(note, f"{key}\n{digest}\n")
    return digest


def _digest(file: str) -> str:
    with _reading(file):
        return sha256(file)


def open_store(url: str) -> tuple[Any, str]:
    """The object store of `url` with fsspec's interface, and the path in it."""
    scheme, _, path = url.partition("://")
    if scheme not in ("s3", "gs"):
        raise DataError(f"Data file is in an unknown kind of store (path={url}). Expected a path, s3:// or gs://.")
    return _connect(scheme), path


@functools.cache
def _connect(scheme: str) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if scheme == "s3":  # credentials as everywhere in AWS: environment, profile or the machine's role
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        store: Any = fs.S3FileSystem(
            endpoint_override=endpoint, region=region, connect_timeout=10, request_timeout=60,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=5),
        )  # fmt: skip
    else:
        store = fs.GcsFileSystem(retry_time_limit=timedelta(seconds=60))
    return ArrowFSWrapper(store)


def _ask(path: str, question: Any) -> Any:
    try:
        return question()
    except OSError as error:
        raise DataError(
            f"Data file cannot be reached (path={path}): {str(error)[:200]}. Expected an object store within reach and "
            "credentials in the environment."
        ) from error
