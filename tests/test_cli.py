import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.errors import ClusterError, DataError, Stopped, own_error
from components.files import only_one
from components.load_config import load_recipe
from pipelines.cli import Command, exit_code, run_cli, storage_folder

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "pipelines" / "recipes" / "demo.yaml")


def test_storage_is_absolute_and_never_in_a_jobs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert storage_folder(load_recipe([DEMO])) == tmp_path / "runs"
    job = tmp_path / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert storage_folder(load_recipe([DEMO])) == tmp_path / "home" / "ray-unlearn" / "runs"
    assert storage_folder(load_recipe([DEMO], ["storage=/data/x"])) == Path("/data/x")


def run(error: Exception, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    def fail(command: Command) -> None:
        raise error

    return run_cli("d", fail, lambda command: "", argv=[DEMO, *flags]), capsys.readouterr().err


def test_our_error_is_found_inside_what_ray_makes_of_it(capsys: pytest.CaptureFixture) -> None:
    from ray.exceptions import RayTaskError

    inner = DataError("Data is bad. Expected good.")
    wrapped = RayTaskError("read", "Traceback ...", inner).as_instanceof_cause()
    assert own_error(wrapped) is inner
    assert run(wrapped, capsys) == (1, "DataError: Data is bad. Expected good.\n")


def test_flags_may_stand_anywhere(capsys: pytest.CaptureFixture) -> None:
    seeds = []

    def plan(command: Command) -> str:
        seeds.append(command.recipe.seed)
        return ""

    assert run_cli("d", lambda command: None, plan, argv=[DEMO, "--dry-run", "seed=7"]) == 0
    assert seeds == [7]


def test_unexpected_errors_are_one_line_unless_debugged(capsys: pytest.CaptureFixture) -> None:
    code, text = run(RuntimeError("first line\nsecond line"), capsys)
    assert code == 1
    assert text == "Unexpected RuntimeError: first line Run again with --debug for the traceback.\n"
    with pytest.raises(RuntimeError):
        run(RuntimeError("x"), capsys, "--debug")


def test_exit_codes_of_ends_that_were_asked_for(capsys: pytest.CaptureFixture) -> None:
    def stop(error: BaseException) -> Callable[[], None]:
        def act() -> None:
            raise error

        return act

    assert exit_code(stop(KeyboardInterrupt()), debug=False) == 130
    assert exit_code(stop(Stopped("Stopped after step 3.", signal.SIGTERM)), debug=False) == 143
    assert exit_code(stop(SystemExit(int(signal.SIGTERM))), debug=False) == 143  # as Ray ends while it starts
    assert capsys.readouterr().err.split() == ["Stopped.", "Stopped", "after", "step", "3.", "Stopped."]
    with pytest.raises(SystemExit):
        exit_code(stop(SystemExit(3)), debug=False)


def test_a_full_disk_is_one_paragraph_with_its_place(capsys: pytest.CaptureFixture) -> None:
    def act() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")

    assert exit_code(act, debug=False) == 1
    told = capsys.readouterr().err
    assert told.startswith("StorageError: File cannot be written (path=/dev/full, bytes free=")
    assert "No space left on device" in told


def test_a_command_leaves_with_its_code_and_all_that_it_said() -> None:
    """Also where its output is a pipe, and where what libraries have registered for the end says something."""
    code = "import atexit; from pipelines.cli import leave; atexit.register(print, 'last'); print('said'); leave(3)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "said\nlast\n", "")


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ClusterError, match="being worked on already"), only_one(tmp_path):
        pass
    with only_one(tmp_path):  # free again
        pass
    assert not list(tmp_path.iterdir())
