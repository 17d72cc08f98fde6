"""What every pipeline shares: command line → recipe, errors → one paragraph and an exit code, Ray up and quiet."""

import argparse
import atexit
import errno
import functools
import io
import json
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from components.cluster import check_sees
from components.config import Recipe, run_name
from components.console import progress_line, silent_stderr
from components.errors import ClusterError, ConfigError, Stopped, own_error
from components.files import refused
from components.load_config import load_recipe
from components.process import is_request, keep_private
from components.tracking.database import database_uri
from components.urls import without_secrets


class Command(NamedTuple):
    """A parsed command line."""

    recipe: Recipe
    words: list[str]
    """Further arguments, such as model folders (evaluate.py)."""
    runs: list[str]
    """Names that the recipe's own run may have: with all settings, and without those of what is measured."""
    suites: list[str]
    """Of what is measured."""
    options: argparse.Namespace = argparse.Namespace()
    """A pipeline's own options."""


def run_cli(
    description: str,
    run: Callable[[Command], None],
    plan: Callable[[Command], str],
    *,
    words: str = "",
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, validate, then `run`, or with --dry-run print the resolved recipe and its `plan`.

    `words` says what further arguments are, where there may be any. Returns the exit code: 0, 1 when the run failed, 2
    when the command or recipe is wrong.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ", ".join(["RECIPE.yaml, section.field=value", *([words] if words else [])])
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help=f"{what}; later ones win")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the plan, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_options(parser)
    options = parsed(parser, argv)

    def act() -> None:
        command = parse_arguments(options.arguments, bool(words))._replace(options=options)
        if options.dry_run:
            print(json.dumps(command.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False))
            print(plan(command))
        else:
            run(command)

    return exit_code(act, options.debug)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, by default this process's. From here on, printing cannot fail."""
    steady_console()
    return parser.parse_intermixed_args(argv)


def exit_code(act: Callable[[], None], debug: bool) -> int:
    """Do it; an error becomes one paragraph and 1, a wrong command or recipe 2, Ctrl-C 130, SIGTERM 143."""
    keep_private()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        _signals_stop()
        act()
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'Stopped.'}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
    except SystemExit as end:  # how Ray takes a SIGTERM while it starts
        if end.code != signal.SIGTERM:
            raise
        print("\nStopped.", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        if debug:
            raise
        print(without_secrets(_paragraph(error)), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def leave(code: int) -> NoReturn:
    """End this process without taking it apart, which lasts seconds with all libraries loaded.

    And gloo's threads, which nothing ends, abort the interpreter now and then while it is taken apart.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


def _signals_stop() -> None:
    """Let SIGTERM and Ctrl-C end this process in order, whose way out is not disturbed by the same request's repeat."""

    def stop(number: int, frame: Any) -> None:
        if is_request():
            raise Stopped("Stopped.", number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell leaves it to what runs in its background
            signal.signal(signal.SIGINT, stop)


def parse_arguments(arguments: Sequence[str], takes_words: bool = False) -> Command:
    """Recipes, overrides and, where they are taken, further words and suites → a command.

    Without a recipe, the first word is the suite's original model.

    Raises:
        ConfigError: naming every mistake in the recipe, or the arguments that are none of these.
    """
    files = [a for a in arguments if a.endswith((".yaml", ".yml")) and "=" not in a]
    suites = [a.removeprefix("suite=") for a in arguments if a.startswith("suite=") and takes_words]
    overrides = [a for a in arguments if "=" in a and not (a.startswith("suite=") and takes_words)]
    words = [a for a in arguments if a not in files and "=" not in a]
    if words and not takes_words:
        raise ConfigError(
            f"Argument not understood ({' '.join(words)}). Expected recipes (*.yaml) and overrides "
            "(section.field=value)."
        )
    if suites and not files and words and not any(o.startswith("models.original") for o in overrides):
        overrides.insert(0, f"models.original={json.dumps({'type': 'pretrained', 'path': words.pop(0)})}")
    recipe = load_recipe(files, overrides, [_SUITES / f"{suite}.yaml" for suite in suites])
    return Command(recipe, words, _own_runs(files, overrides) if files else [], suites)


def _own_runs(files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    names = []
    for kept in (overrides, [o for o in overrides if not o.startswith(("evaluation", "attacks"))]):
        with suppress(ConfigError):  # an override of what only a suite has
            names.append(run_name(load_recipe(files, kept)))
    return names


_SUITES = Path(__file__).with_name("suites")


def _paragraph(error: Exception) -> str:
    own = own_error(error)
    if own is None and isinstance(error, OSError) and error.errno in _REFUSALS and error.filename:
        own = error = refused("File", str(error.filename), error)
    if own:  # what Ray added to an error of a task stands on lines of its own
        return f"{type(own).__name__}: {own if own is error else _first_line(own)}"
    return f"Unexpected {type(error).__name__}: {_first_line(error)} Run again with --debug for the traceback."


# No space, no quota, no right, read-only, too long a name
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


_SETTINGS = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",  # a stall is an error, not 30 silent minutes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "HF_HUB_DOWNLOAD_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the spool tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # an error, not half a value
}
"""Read by the libraries when they are imported; what the user has set stays."""


@contextmanager
def ray_session(storage: Path | None = None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names (set inside a Ray job), else start Ray on this machine.

    Raises:
        ClusterError: when that fails, for whatever reason; within a minute where nothing answers at RAY_ADDRESS. And
            when not every node sees the `storage` folder.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join_ray(address)
        else:
            _start_ray()
    except Exception as error:
        raise ClusterError(_no_cluster(address, error)) from error
    _signals_stop()  # Ray has put its own hand on it
    _quiet_driver()
    try:
        if storage:
            check_sees(storage)
        yield
    finally:
        ray.shutdown()


_HEAD_PATIENCE = 20.0  # seconds that a head may take to answer, such as while it starts
_STARTS = 3  # of Ray on this machine, whose processes may be slow when it is busy


def _join_ray(address: str) -> None:
    """Connect to a running cluster, after asking its head whether it is there.

    Ray itself waits for minutes for a head that does not answer, then ends the process.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    if re.fullmatch(r"[^/]+:\d+", address):  # others, such as `auto`, Ray looks up or refuses at once
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            ask = NodeInfoGcsServiceStub(channel).GetClusterId
            try:
                ask(GetClusterIdRequest(), timeout=_HEAD_PATIENCE, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise ConnectionError(f"nothing answers there within {_HEAD_PATIENCE:g} s.") from None
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    raise ConnectionError("what answers there is no head of Ray.") from None
                # else it is there, and ray.init tells what it has against us, such as a missing token
    _init_ray(address)


def _start_ray() -> None:
    """Start Ray on this machine, again where its processes were not up in time.

    They are no part of this command's process group: a signal to all of it would end the workers of a job that is to
    write a checkpoint first. They end with this process nevertheless, which the kernel sees to.
    """
    import ray
    from ray._private import services

    usual: Any = services.ConsolePopen
    services.ConsolePopen = functools.partial(usual, process_group=0)  # type: ignore[assignment,misc]
    try:
        for last in (False,) * (_STARTS - 1) + (True,):
            try:
                _init_ray("local", include_dashboard=False)
                return
            except Exception as error:
                if last or "timed out" not in str(error).lower():
                    raise
                ray.shutdown()
    finally:
        services.ConsolePopen = usual  # type: ignore[misc]


def _init_ray(address: str, **options: Any) -> None:
    import ray

    # Progress comes through files that the driver follows, so workers need not print here.
    with silent_stderr():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)


def _no_cluster(address: str | None, error: Exception) -> str:
    why = f"{type(error).__name__}: {_first_line(error).rstrip('.')}."
    if address:
        return (
            f"Cannot connect to the Ray cluster (RAY_ADDRESS={address}): {why} Expected host:port of a running head. "
            "Start one with cluster/local/head.sh, set RAY_AUTH_MODE=token where it uses tokens, or unset RAY_ADDRESS."
        )
    return (
        f"Ray cannot be started on this machine: {why} Expected room in /tmp (or RAY_TMPDIR, of few characters) and in "
        "/dev/shm, free memory and processes. Free some, or set RAY_ADDRESS to a running cluster."
    )


def _quiet_driver() -> None:
    from components.models import quiet_libraries

    quiet_libraries()
    for name in ("ray.train", "mlflow", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print at once, also where the output is a file or a job log."""
    print(text, flush=True)


class Progress:
    """Prints every n-th line of a metrics.jsonl and its last; speed is the average since the line before."""

    def __init__(self, every: int):
        self.every = every
        self.pending: list[dict[str, Any]] = []

    def __call__(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self.pending.append(line)
            if (line["step"] - 1) % self.every == 0 or line["step"] == line["steps"]:
                seconds = sum(item["perf/step_seconds"] for item in self.pending)
                tokens = sum(item["perf/tokens_per_second"] * item["perf/step_seconds"] for item in self.pending)
                say("  " + progress_line(line, tokens / seconds, seconds / len(self.pending)))
                self.pending = []


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow server, else the environment's, else a database in the storage folder."""
    given = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or database_uri(storage_folder(recipe) / "mlflow.db")


def storage_folder(recipe: Recipe) -> Path:
    """Where the recipe's runs, models and prepared rows lie."""
    return absolute_folder(recipe.storage)


def absolute_folder(given: str) -> Path:
    """Absolute, since workers run elsewhere; a relative one is not kept in a Ray job's folder, which Ray deletes."""
    path = Path(given).expanduser()
    if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
        path = Path.home() / "ray-unlearn" / path
    return path.resolve()


def steady_console() -> None:
    """Make printing unable to fail, for this process from now on: losing its console must not cost a run its result.

    Characters that the console's encoding lacks are escaped, as in ascii(). After a write failed, because the reader of
    the pipe left (`| head`), the disk is full or the terminal is gone, further text is discarded. A stream that was
    closed by whoever started the process (`>&-`) leads nowhere.
    """
    for descriptor in range(3):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one: else the next file would get it
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            text = io.TextIOWrapper(
                io.BufferedWriter(_Descriptor(descriptor)),
                encoding=stream.encoding if stream else "utf-8",
                errors="backslashreplace",
                line_buffering=bool(stream and stream.line_buffering),
                write_through=bool(stream and stream.write_through),
            )
            setattr(sys, name, text)
        else:  # ours already, or a test's
            stream.reconfigure(errors="backslashreplace")


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor until that fails, then nowhere. Waits for one that does not block."""

    def __init__(self, number: int):
        self._number, self._lost = number, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        while not self._lost:
            try:
                return os.write(self._number, data)
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                self._lost = True
                if error.errno != errno.EPIPE:  # by which a reader says that it has seen enough
                    self._tell(error)
        return len(data)

    def _tell(self, error: OSError) -> None:
        name, other = ("stdout", 2) if self._number == 1 else ("stderr", 1)
        with suppress(OSError):
            os.write(other, f"{name} cannot be written: {error.strerror}. The command goes on without it.\n".encode())
