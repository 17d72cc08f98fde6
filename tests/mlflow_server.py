"""Real MLflow servers for tests: on sqlite or PostgreSQL, with or without accounts; killed and started as wanted."""

import getpass
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real `mlflow server`, that can be killed and started again."""

    def __init__(self, folder: Path, store: str | None = None, auth: Path | None = None):
        self.port = free_port()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        folder.mkdir()
        self.store, self.auth = store or f"sqlite:///{folder}/mlflow.db", auth

    def start(self) -> None:
        app = ["--app-name", "basic-auth"] if self.auth else []
        environment = {
            **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_MODEL_CATALOG_URI": "",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "tests", "MLFLOW_AUTH_CONFIG_PATH": str(self.auth or ""),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers",
             "1", "--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts"), *app],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=(self.folder / "log").open("w"), env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        raise TimeoutError(f"mlflow server did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of a PostgreSQL of our own, of the Debian package; skips the test where that is not installed."""
    [*found] = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or filter(None, [shutil.which("initdb")])
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    root = getpass.getuser() == "root"  # which PostgreSQL refuses to run as
    user = "postgres" if root else getpass.getuser()
    bin_folder, folder, port = Path(found[-1]).parent, Path(tempfile.mkdtemp(prefix="pg-")), free_port()
    if root:
        shutil.chown(folder, user)

    def ask(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, user=user if root else None, cwd=folder)

    ask(str(bin_folder / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", user)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    ask(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
    finally:
        ask(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
