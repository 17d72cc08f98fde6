"""What is downloaded from the hub is whole before it is used."""

from pathlib import Path

import huggingface_hub
import pytest

from components.config import Pretrained
from components.errors import ModelError
from components.models import local_folder, tokenizer_folder

MODEL = Pretrained(type="pretrained", path="owner/name")


@pytest.mark.parametrize("find", [local_folder, tokenizer_folder])
@pytest.mark.parametrize("came", [["config.json"], ["config.json", "tokenizer.json"], ["model-1-of-2.safetensors"]])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, SystemExit])
def test_half_a_download_is_not_taken_for_the_model_when_the_hub_is_out_of_reach(
    stop: type[BaseException], came: list[str], find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(path: str, local_dir: Path, **settings: object) -> None:
        for name in came:
            local_dir.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_text("{}")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", cut_short)
        with pytest.raises((stop, ModelError)):
            find(MODEL, tmp_path)
    with pytest.raises(ModelError, match="owner/name"):  # the tests' environment is offline
        find(MODEL, tmp_path)


@pytest.mark.parametrize("find", [local_folder, tokenizer_folder])
def test_a_whole_download_is_used_when_the_hub_is_out_of_reach(
    find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(path: str, local_dir: Path, **settings: object) -> None:
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", whole)
        folder = find(MODEL, tmp_path)
    for _ in range(2):
        assert find(MODEL, tmp_path) == folder
    assert [file.name for file in folder.iterdir()] == ["config.json"]
