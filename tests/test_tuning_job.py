"""A sweep submitted to a real head."""

import csv
from pathlib import Path

import pytest
import yaml

from tests.test_job import head, ray, submit
from tests.test_pipelines import SMALL
from tests.test_tuning_trials import SPACE

pytestmark = pytest.mark.long
__all__ = ["head"]  # the fixture


def test_a_sweep_runs_as_a_ray_job_with_two_trials_at_once(head: dict[str, str], tmp_path: Path) -> None:
    recipe, space = tmp_path / "small.yaml", tmp_path / "space.yaml"
    train = {**SMALL["train"], "steps": 12}
    recipe.write_text(yaml.safe_dump({**SMALL, "train": train, "storage": str(tmp_path / "runs")}))
    space.write_text(yaml.safe_dump({**SPACE, "search": {"trials": 4, "startup": 2}}, sort_keys=False))
    done = submit(head, "python", "pipelines/tune.py", str(recipe), str(space), job="sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = ray("job", "logs", "sweep", environment=head).stdout
    ours = logs[logs.index("sweep        ") :].rstrip().splitlines()
    assert "2 at once, each in one process" in logs
    first_end = next(i for i, line in enumerate(ours) if " finished " in line)
    assert sum("begins" in line for line in ours[:first_end]) == 2
    assert len(ours) < 70
    assert max(map(len, ours)) < 220
    assert "\x1b[" not in "\n".join(ours)
    noise = [line for line in logs.splitlines() if "WARNING" in line or "INFO" in line or "pid=" in line]
    assert len(noise) <= 2, noise
    [folder] = (tmp_path / "runs" / "sweeps").iterdir()
    assert [row["state"] for row in csv.DictReader((folder / "trials.csv").open())] == ["finished"] * 4
    assert (folder / "best.yaml").exists()
