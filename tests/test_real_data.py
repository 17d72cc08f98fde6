"""The TOFU recipe on the published files and a real pretrained model, cut short."""

from pathlib import Path

import pytest

from components.model_files import parameter_count
from components.models import load_tokenizer
from tests.test_pipelines import ROOT, command

RECIPE = str(ROOT / "pipelines" / "recipes" / "tofu-forget01-stories260k.yaml")


@pytest.mark.long
@pytest.mark.parametrize("optimizer", [["optimizer.type=soul"], ["optimizer.type=adamw", "optimizer.lr=1e-3"]])
def test_tofu_runs_with_both_optimizers(shared: Path, tmp_path_factory: pytest.TempPathFactory, optimizer) -> None:
    storage = tmp_path_factory.getbasetemp() / "tofu"  # the second optimizer finds the first one's models
    done = command(
        "unlearn", RECIPE, *optimizer, f"data.folder={shared}", f"finetune.base.path={shared / 'stories260K-hf'}",
        f"storage={storage}", "finetune.train.steps=30", "train.steps=4", "evaluation.max_new_tokens=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data         forget 40, normal 297, random 817 rows" in done.stdout
    assert "260,032 parameters, ZeRO-3, 2 Ray workers" in done.stdout
    for metric in ("forget_quality", "model_utility", "real_authors_probability", "world_facts_truth_ratio"):
        assert f"\n{metric}" in done.stdout


def test_the_real_model_is_read_as_published(shared: Path) -> None:
    folder = shared / "stories260K-hf"
    assert parameter_count(folder) == 260_032
    assert load_tokenizer(folder).eos_token_id == 2
