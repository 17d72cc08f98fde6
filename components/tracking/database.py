"""MLflow's database in a file: its address as a URL, and a file that is whole whatever happens while it is made."""

import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import filelock

from components.errors import StorageError, TrackingError
from components.files import writing

_LONGEST = 480  # bytes of a path: SQLite has 512, of which the names of what is written beside it need some
_PLAIN, _ESCAPED = "sqlite:///", "sqlite+pysqlite:///"


def database_uri(file: Path) -> str:
    """The URL of a database file, in which `%` and `?` of its path are escaped."""
    path = str(file).replace("%", "%25").replace("?", "%3F")
    # Of an URL that begins as the first one does, MLflow makes the folder that it names before it is unescaped.
    return f"{_PLAIN if path == str(file) else _ESCAPED}{path}"


def database_file(uri: str) -> Path | None:
    """The database file that a tracking URI names; None for a server, or a database of another kind."""
    prefix = next((prefix for prefix in (_PLAIN, _ESCAPED) if uri.startswith(prefix)), None)
    path = uri.partition("?")[0].removeprefix(prefix) if prefix else ""
    return Path(unquote(path)) if path else None


def make_database(file: Path) -> None:
    """Make MLflow's tables in `file` unless they are there: beside it first, then in its place.

    MLflow makes its tables one by one in the file itself. Where a kill or a full disk cuts that short, it fails
    forever after, since a table that it wants to make exists. Here, such a file is made again where it holds no runs.
    Where it does, as after an upgrade of MLflow, a copy gets the missing tables, and the file before the upgrade is
    kept as `<file>.before-<revision>`.

    Raises:
        StorageError: when the file cannot be written.
        TrackingError: when the file is damaged, or its tables cannot be completed.
    """
    if (length := len(os.fsencode(file.absolute()))) > _LONGEST:
        raise StorageError(
            f"MLflow's database cannot be opened (path={file}, bytes of the path={length:,}). Expected at most "
            f"{_LONGEST}, for which SQLite has room. Set storage, or tracking.uri, to a shorter path."
        )
    with writing("MLflow's database", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if _revision_missing(file):
            with filelock.FileLock(file.with_name(f"{file.name}.lock")):
                if missing := _revision_missing(file):
                    _make_beside(file, missing)


def _make_beside(file: Path, revision: str) -> None:
    partials = f"{file.name}.partial-"
    _remove_beginning(file.parent, partials)  # of a process that was killed
    partial = file.with_name(f"{partials}{uuid.uuid4().hex[:8]}")
    try:
        holds_runs = _holds_runs(file)
        if holds_runs:
            with closing(sqlite3.connect(file)) as old, closing(sqlite3.connect(partial)) as new:
                old.backup(new)
        _make_tables(partial, file)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        if holds_runs:
            os.link(file, file.with_name(f"{file.name}.before-{revision}"))
        file.with_name(f"{file.name}-journal").unlink(missing_ok=True)  # of the file that goes
        os.replace(partial, file)
    finally:
        _remove_beginning(file.parent, partials)


def _remove_beginning(folder: Path, prefix: str) -> None:
    """A database and the files that SQLite writes beside it."""
    for found in folder.iterdir():
        if found.name.startswith(prefix):
            found.unlink(missing_ok=True)


def _make_tables(partial: Path, file: Path) -> None:
    """As MLflow itself makes them."""
    import sqlalchemy.event
    from mlflow.store.db import utils
    from sqlalchemy.exc import SQLAlchemyError

    with _opened(partial) as engine:
        # Nobody reads it before it is whole: no statement needs to wait for the disk.
        sqlalchemy.event.listen(engine, "connect", lambda own, record: own.execute("pragma synchronous = off"))
        try:
            utils._initialize_tables(engine)
        except SQLAlchemyError as error:
            raise _refused(file, getattr(error, "orig", error)) from error


def _revision_missing(file: Path) -> str | None:
    """The revision of the file's tables, `none` where it has none; None where nothing is missing."""
    if not file.exists() or not file.stat().st_size:
        return "none"
    from mlflow.store.db import utils
    from sqlalchemy.exc import DatabaseError

    with _opened(file) as engine:
        try:
            found = utils._get_schema_version(engine) or "none"
            whole = utils._all_tables_exist(engine) and found == utils._get_latest_schema_revision()
            return None if whole else found
        except DatabaseError as error:
            raise _refused(file, error.orig) from error


def _holds_runs(file: Path) -> bool:
    """Whether the file holds more than the empty experiment that MLflow makes on its own."""
    if not file.exists():
        return False
    told = {"experiments": "where experiment_id != 0", "runs": "", "registered_models": ""}
    try:
        with closing(sqlite3.connect(file)) as database:
            there = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            asked = [f"select 1 from {table} {where} limit 1" for table, where in told.items() if table in there]
            return any(database.execute(question).fetchone() for question in asked)
    except sqlite3.DatabaseError as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: Any) -> Exception:
    """The error to raise where SQLite does not do what it is asked."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest tells kinds of it apart
    if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return OSError(str(error))  # no space, no right, locked
    return TrackingError(
        f"MLflow's database is damaged (path={file}, bytes={file.stat().st_size:,}): {error}. Expected a whole SQLite "
        "file with the tables of this MLflow. Put a backup in its place; or move it away, remove mlflow/sent.json from "
        "the folders of the runs that a new database is to hold, and repeat their commands."
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import sqlalchemy

    for name in ("alembic", "mlflow"):  # a new database reports each of its tables
        logging.getLogger(name).setLevel(logging.ERROR)
    engine = sqlalchemy.create_engine(database_uri(file), poolclass=sqlalchemy.NullPool)
    try:
        yield engine
    finally:
        engine.dispose()
