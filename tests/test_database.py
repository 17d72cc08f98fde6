"""MLflow's database file: whatever its folder is called, and whatever cut its making short."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from components.errors import StorageError, TrackingError
from components.tracking import registry
from components.tracking.client import experiment_id, make_client
from components.tracking.database import database_file, database_uri
from components.tracking.run import open_spool, put_run

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "plain", "a 50%25 b", "100%", "%(here)s", "a%20b", "h#sh", "que?stion", "q?mode=ro&x=1", "sp ace", "ünï✓ 文",
    "a+b;c", "co:lon", "at@x", "quo'te\"", "back\\slash", "new\nline", "[br]ackets*", "~tilde", "l" * 200,
]  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database, made where a pasted path would be read as something else."""
    folder = tmp_path_factory.mktemp("databases") / "a 50%25 b?mode=ro#%(x)s"
    make_client(database_uri(folder / "mlflow.db"))
    assert [found.name for found in folder.parent.iterdir()] == [folder.name]
    assert {found.name for found in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    return folder / "mlflow.db"


@pytest.mark.parametrize("name", NAMES)
def test_a_storage_folder_may_have_any_name(name: str, database: Path, base: Path, tmp_path: Path) -> None:
    """Database, artifacts and registered models lie in it, and nothing is made beside it."""
    storage = tmp_path / name
    storage.mkdir()
    shutil.copy(database, storage)
    uri = database_uri(storage / "mlflow.db")
    assert database_file(uri) == storage / "mlflow.db"
    client = make_client(uri)
    run = client.create_run(experiment_id(client, "x", storage)).info
    (tmp_path / "note.txt").write_text("told")
    client.log_artifact(run.run_id, str(tmp_path / "note.txt"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    registry.register(client, run.run_id, model, "m", {}, step=1, trained_at="2026-01-01")
    fetched = registry.fetch(client, registry.candidate(client, "m"), storage / "registered")
    assert (fetched / "config.json").read_text() == "{}"
    assert {found.name for found in tmp_path.iterdir()} == {name, "note.txt", "model"}
    assert len(list(storage.glob("mlflow-artifacts/**/note.txt"))) == 1
    with closing(sqlite3.connect(storage / "mlflow.db")) as found:
        assert found.execute("select run_uuid from runs").fetchall() == [(run.run_id,)]


def test_a_path_that_sqlite_has_no_room_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"bytes of the path=.*Expected at most 480"):
        make_client(database_uri(tmp_path.joinpath(*["d" * 200] * 3, "mlflow.db")))


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////a/b.db", "/a/b.db"), ("sqlite:///b.db", "b.db"), ("sqlite:////a%20b/c.db?mode=ro", "/a b/c.db"),
        ("sqlite+pysqlite:////50%25/c.db", "/50%/c.db"), ("sqlite://", None), ("http://h:5000/b.db", None),
        ("postgresql://h/b", None), ("/a/b", None),
    ],
)  # fmt: skip
def test_the_file_of_a_tracking_uri(uri: str, file: str | None) -> None:
    assert database_file(uri) == (Path(file) if file else None)


# A process that makes MLflow's tables as MLflow does, and is killed after a statement.
MAKES = """
import os, signal, sys
import sqlalchemy
from mlflow.store.db import utils
engine = sqlalchemy.create_engine(f"sqlite:///{sys.argv[1]}")
sqlalchemy.event.listen(engine, "connect", lambda own, record: own.execute("pragma synchronous = off"))

def after(connection, cursor, statement, *rest):
    if sys.argv[2] in " ".join(statement.split()):
        os.kill(os.getpid(), signal.SIGKILL)

sqlalchemy.event.listen(engine, "after_cursor_execute", after)
utils._initialize_tables(engine)
"""


def killed_after(file: Path, statement: str) -> None:
    code = subprocess.run([sys.executable, "-c", MAKES, file, statement], capture_output=True).returncode
    assert code == -signal.SIGKILL
    with closing(sqlite3.connect(file)) as found:
        assert found.execute("select count(*) from sqlite_master").fetchone() > (0,)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE secrets",  # as in a report: the table is there, and MLflow wants to make it
        pytest.param("CREATE TABLE experiments", marks=pytest.mark.slow),  # the first
        pytest.param("ALTER TABLE experiments ADD", marks=pytest.mark.slow),
        pytest.param("CREATE TABLE model_versions", marks=pytest.mark.slow),
        pytest.param("DROP TABLE", marks=pytest.mark.slow),
        pytest.param("UPDATE alembic_version", marks=pytest.mark.slow),
    ],
)
def test_what_a_kill_left_half_made_is_made_again_and_the_spool_drains(statement: str, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    killed_after(file, statement)
    spool = open_spool(tmp_path / "run", database_uri(file), lambda text: None)
    put_run(spool, "x", tmp_path, tmp_path / "run", {"a": 1}, {})
    for i in range(28):
        spool.put("tags", tags={f"t{i}": "told"})
    assert spool.unsent() == 29
    assert spool.drain(60) == 0
    assert not spool.refused()
    run = make_client(database_uri(file)).get_run(spool.known["run_id"])
    assert {key for key in run.data.tags if key.startswith("t")} == {f"t{i}" for i in range(28)}


def test_a_kill_while_ours_is_made_leaves_no_database_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mlflow.store.db import utils\n"
        "from components.tracking.database import make_database\n"
        "utils._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_database(Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, file], cwd=ROOT).returncode == -signal.SIGKILL
    assert not file.exists()
    assert len(list(tmp_path.glob("mlflow.db.partial-*"))) == 1
    make_client(database_uri(file))
    assert {found.name for found in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_full_disk_leaves_no_database_and_is_told(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    file = tmp_path / "mlflow.db"
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from components.errors import StorageError\n"
        "from components.tracking.database import make_database\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    make_database(Path(sys.argv[1]))\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True)
    assert f"MLflow's database cannot be written (path={file}" in done.stdout, done.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["mlflow.db.lock"]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.7, 0.98])
def test_a_truncated_database_is_named_or_made_again_and_never_replaced(
    kept: float, database: Path, tmp_path: Path
) -> None:
    file, whole = tmp_path / "mlflow.db", tmp_path / "whole.db"
    shutil.copy(database, whole)
    client = make_client(database_uri(whole))
    client.create_run(client.create_experiment("x"))
    shutil.copy(whole, file)
    os.truncate(file, int(kept * file.stat().st_size))
    before = file.read_bytes()
    if not before:
        assert make_client(database_uri(file)).search_experiments()
        return
    spool = open_spool(tmp_path / "run", database_uri(file), lambda text: None)
    spool.put("tags", tags={"a": "b"})
    assert not spool.send()
    assert isinstance(spool.error, TrackingError)
    assert str(spool.error).startswith(f"MLflow's database is damaged (path={file}, bytes={len(before):,})")
    assert "move it away" in str(spool.error)
    assert file.read_bytes() == before
    assert spool.unsent() == 1


@pytest.mark.parametrize(
    "revision", ["3500859a5d39", *(pytest.param(r, marks=pytest.mark.slow) for r in ("97727af70f4d", "7ac759974ad8"))]
)
def test_an_older_mlflows_runs_are_kept_where_tables_are_added(revision: str, tmp_path: Path) -> None:
    import sqlalchemy
    from alembic import command
    from mlflow.store.db import utils

    file = tmp_path / "mlflow.db"
    engine = sqlalchemy.create_engine(database_uri(file))
    utils.InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config = utils._get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with closing(sqlite3.connect(file)) as old:
        old.execute("insert into experiments (experiment_id, name, lifecycle_stage) values (1, 'x', 'active')")
        run = {"run_uuid": "r", "name": "kept", "experiment_id": 1, "user_id": "me", "status": "FINISHED",
               "start_time": 1, "lifecycle_stage": "active", "artifact_uri": "/a/r"}  # fmt: skip
        marks = ", ".join("?" * len(run))
        old.execute(f"insert into runs ({', '.join(run)}) values ({marks})", list(run.values()))
        old.commit()
    assert make_client(database_uri(file)).get_run("r").info.run_name == "kept"
    assert (tmp_path / f"mlflow.db.before-{revision}").exists()
