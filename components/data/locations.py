"""Data files on this machine or in an object store: find them, open them, tell their content apart."""

import functools
import glob
import hashlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.files import sha256, write_whole

_HASH_AGAIN_BELOW = 1 << 20  # bytes; the digest of a larger file is remembered with its size and time


def find(patterns: str | list[str]) -> list[str]:
    """Absolute paths or URLs of the files that `patterns` name, each pattern's sorted.

    Raises:
        DataError: when a pattern matches nothing, or its object store cannot be reached.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if is_remote(pattern):
            store, path = open_store(pattern)
            scheme = pattern.partition("://")[0]
            matches = [f"{scheme}://{match}" for match in _ask(pattern, functools.partial(store.glob, path))]
        else:
            path = os.path.expanduser(pattern)
            found_here = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            matches = [str(Path(match).resolve()) for match in found_here]
        if not matches:
            raise DataError(f"Data file not found (path={pattern}). Expected a file or a glob that matches one.")
        found += matches
    return found


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of an object store."""
    return "://" in path


def open_file(file: str, *, random_access: bool = False) -> Any:
    """A binary file object; a remote one without random access is read ahead."""
    if not is_remote(file):
        return open(file, "rb")
    store, path = open_store(file)
    opener = (
        store.fs.open_input_file if random_access else functools.partial(store.fs.open_input_stream, compression=None)
    )
    return _ask(file, lambda: opener(path))


def size(file: str) -> int:
    """Bytes of one file."""
    if not is_remote(file):
        return os.path.getsize(file)
    store, path = open_store(file)
    return int(_ask(file, lambda: store.info(path))["size"])


def state(file: str) -> str:
    """Size and time of the last change of one file."""
    if is_remote(file):
        store, path = open_store(file)
        info = _ask(file, lambda: store.info(path))
        return f"{info['size']} {info['mtime']}"
    stat = os.stat(file)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def content_digest(file: str, memory: Path) -> str:
    """Hex digest that changes with the file's content.

    A local file's bytes are hashed; for a large one the result is remembered under `memory` as long as size and time
    of change stay. An object in a store goes by its size and time of change.
    """
    if is_remote(file):
        return hashlib.sha256(f"{file} {state(file)}".encode()).hexdigest()
    if os.path.getsize(file) < _HASH_AGAIN_BELOW:
        return sha256(file)
    note = memory / hashlib.sha256(file.encode()).hexdigest()[:32]
    key = f"{file} {state(file)}"
    if note.exists() and note.read_text(encoding="utf-8").startswith(key + "\n"):
        return note.read_text(encoding="utf-8").splitlines()[1]
    digest = sha256(file)
    memory.mkdir(parents=True, exist_ok=True)
    write_whole(note, f"{key}\n{digest}\n")
    return digest


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
