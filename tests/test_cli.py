from pathlib import Path

import pytest

from components.errors import DataError, own_error
from components.load_config import load_recipe
from pipelines.cli import Command, run_cli, storage_folder

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
