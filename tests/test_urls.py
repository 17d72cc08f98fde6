"""Secrets in URLs are hidden where they are shown, and refused where they would be stored."""

from pathlib import Path

import pytest

from components.errors import ConfigError
from components.load_config import load_recipe
from components.tracking.spool import Spool
from components.urls import secrets_in, shown_url, without_secrets
from pipelines import unlearn
from pipelines.cli import run_cli

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "recipes" / "demo.yaml"
SECRET = "hunter2"
WITH_SECRETS = {
    "https://host/path?token=hunter2": "https://host/path?token=***",
    "s3://AKIA:hunter2@bucket/a": "s3://***@bucket/a",
    "s3://AKIA:ab/hunter2+x@bucket/a": "s3://***@bucket/a",
    "https://hunter2@host:5000": "https://***@host:5000",
    "https://me:hunter2@host/@x": "https://***@host/@x",
    "postgresql://me:hunter2@host:5432/db?sslmode=require": "postgresql://***@host:5432/db?sslmode=require",
    "mysql+pymysql://me:a#hunter2@host/db": "mysql+pymysql://***@host/db",
    "https://host/?X-Amz-Signature=hunter2&X-Amz-Date=1": "https://host/?X-Amz-Signature=***&X-Amz-Date=***",
    "https://host/#access_token=hunter2": "https://host/#access_token=***",
    "https://host?hunter2": "https://host?***",
    "https://host/x?a=1;sig=hunter2": "https://host/x?a=***;sig=***",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2": "mssql+pyodbc:///?odbc_connect=***",
    "gs://bucket/x?KEY=hunter2": "gs://bucket/x?KEY=***",
}
WITHOUT = [
    "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning", "s3://bucket/me@example.com/x.jsonl",
    "s3://bucket/part-?.jsonl.gz", "sqlite:////home/a@b:c/m.db?mode=ro", "http://host:80/a@b", "http://[::1]:5000/a@b",
    "postgresql://host/db?sslmode=require&connect_timeout=3", "models:/name@champion", "file:///a:b@c", "a@b.example",
]  # fmt: skip


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_secret_is_hidden_and_the_rest_is_shown(url: str) -> None:
    assert shown_url(url) == WITH_SECRETS[url]
    assert without_secrets(f"from {url} to '{url}'") == f"from {WITH_SECRETS[url]} to '{WITH_SECRETS[url]}'"
    assert any(SECRET in secret for secret in secrets_in(url))
    assert SECRET not in without_secrets(f"refused: {' and '.join(secrets_in(url))}", url)


@pytest.mark.parametrize("url", WITHOUT)
def test_a_url_without_secret_stays_as_it_is(url: str) -> None:
    assert secrets_in(url) == []
    assert shown_url(url) == without_secrets(url) == url
    load_recipe([DEMO], [f"tracking.uri={url}", "tracking.registered_model=null"])


@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize(
    "setting", ["tracking.uri", "tracking.production", "train.checkpoint_storage", "data.folder", "storage",
                "evaluation.retain_log", "data.forget", "attacks.prefixes"]
)  # fmt: skip
def test_a_recipe_with_a_secret_is_refused_without_telling_it(setting: str, url: str) -> None:
    value = {
        "data.forget": f"[{{type: files, path: ['{url}']}}]", "attacks.prefixes": f"{{a: '{url}'}}",
    }.get(setting, f"'{url}'")  # fmt: skip
    files = ["data.normal=[{type: files, path: x.jsonl}]"] if setting == "data.folder" else []
    with pytest.raises(ConfigError, match="is a URL with a user, password, token") as refused:
        load_recipe([DEMO], [f"{setting}={value}", *files])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize("words", ["tracking.urr={}", "seed={}", "{}", "tracking.uri=[{}", "train.steps=[{}]"])
def test_what_is_typed_wrong_is_told_without_its_secret(
    words: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("", unlearn.run, unlearn.plan, argv=[str(DEMO), words.format(url), "--dry-run"]) == 2
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
    assert "Error" in told.err


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_the_spool_tells_and_keeps_no_secret_of_its_server(url: str, tmp_path: Path) -> None:
    class Refused(Exception):
        error_code = "BAD_REQUEST"

    def refuse(client: object, known: object, entry: dict) -> None:
        secret = next(secret for secret in secrets_in(url) if SECRET in secret)
        raise Refused(f"{url} refused {secret}") if entry["kind"] == "a" else OSError(f"no route to {url}")

    told: list[str] = []
    spool = Spool(tmp_path / "s", url, object, {"a": refuse, "b": refuse}, told.append)
    spool.put("a")
    spool.put("b")
    assert not spool.send()
    written = "".join(file.read_text() for file in (tmp_path / "s").iterdir())
    assert "refused" in written
    assert "no route" in told[0]
    assert SECRET not in written + told[0]
