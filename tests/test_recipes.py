"""Every recipe's data, taken from the published files: as many rows as were published, less those set aside."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import Recipe
from components.data.prepare import summary_of
from components.data.prompts import Encoder, TokenizerFacts
from components.data.rows import PreparedRows
from components.data.tokenise import data_settings
from components.errors import DataError
from components.load_config import load_recipe
from components.models import load_tokenizer, tokenizer_facts
from pipelines.prepare import Streams, described, prepare_streams, preview
from tests.test_pipelines import ROOT, command

RECIPES = ROOT / "pipelines" / "recipes"
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def facts(shared: Path) -> TokenizerFacts:
    return tokenizer_facts(load_tokenizer(shared / "gpt2-tokenizer"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def recipe(name: str, folder: Path, *overrides: str) -> Recipe:
    return load_recipe([RECIPES / f"{name}.yaml"], [f"data.folder={folder}", *overrides])


def counts(streams: Streams) -> dict[str, tuple[int, int, int]]:
    """Rows, rows set aside and rows filtered."""
    summaries = {name: summary_of(prepared) for name, prepared in streams.sets().items()}
    return {name: (s["good"], s["bad"], s["filtered"]) for name, s in summaries.items()}


def truthful_answers(shared: Path) -> int:
    """The published answers, counted by hand: one best each, and those between semicolons."""
    with (shared / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 817
    lists = [row[column].split("; ") for row in rows for column in ("Correct Answers", "Incorrect Answers")]
    return len(rows) + sum(1 for answers in lists for answer in answers if answer.strip())


def test_tofu(shared: Path, place: Path, facts: TokenizerFacts) -> None:
    streams = prepare_streams(recipe("tofu-forget10", shared), facts, place)
    assert counts(streams) == {"forget": (400, 0, 0), "normal": (3600, 0, 0), "random": (100 + 117, 0, 0)}
    assert streams.overlap is None


@pytest.mark.parametrize(("number", "kept"), [("01", "99"), ("05", "95")])
def test_tofus_other_splits(shared: Path, place: Path, facts: TokenizerFacts, number: str, kept: str) -> None:
    sources = [f"{{type: files, path: tofu/{name}.json}}" for name in (f"forget{number}", f"retain{kept}")]
    chosen = recipe("tofu-forget10", shared, f"data.forget=[{sources[0]}]", f"data.normal=[{sources[1]}]")
    found = counts(prepare_streams(chosen, facts, place))
    assert (found["forget"][0], found["normal"][0]) == (40 * int(number), 40 * int(kept))


def test_hh_rlhf_and_truthfulqa(shared: Path, place: Path, facts: TokenizerFacts) -> None:
    streams = prepare_streams(recipe("harmful-hh-rlhf", shared), facts, place)
    assert counts(streams) == {
        "forget": (2312 - 1, 1, 0), "normal": (817, 0, 0), "random": (truthful_answers(shared), 0, 0),
    }  # fmt: skip
    assert list(summary_of(streams.forget)["reasons"]) == ["the messages before the answer do not end with a question"]
    with gzip.open(shared / "hh-rlhf-harmless" / "harmless-base.test.jsonl.gz", "rt") as stream:
        published = json.loads(next(stream))["rejected"]
    rows, encoder = PreparedRows(streams.forget.folder), Encoder(facts, data_settings(recipe("demo", shared).data))
    answer = encoder.decode(rows.answer(0).tolist())
    assert published.endswith(f"Assistant:{answer.removesuffix('<|endoftext|>')}")


def test_pku_saferlhf(shared: Path, place: Path, facts: TokenizerFacts, tmp_path: Path) -> None:
    """Made-up pairs in the published form: the hub is out of reach here."""
    (tmp_path / "truthfulqa").symlink_to(shared / "truthfulqa")
    (tmp_path / "pku-saferlhf").mkdir()
    rows = [
        {"prompt": f"How {i}?", "response_0": f"So {i}.", "response_1": f"Thus {i}.", "is_response_0_safe": i % 2 == 0,
         "is_response_1_safe": i % 3 == 0}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "pku-saferlhf" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = counts(prepare_streams(recipe("harmful-pku-saferlhf", tmp_path), facts, place))
    assert found["forget"] == (30 + 40, 0, 30 + 20)


def test_halueval(shared: Path, place: Path, facts: TokenizerFacts) -> None:
    found = counts(prepare_streams(recipe("hallucination-halueval", shared), facts, place))
    assert found == {"forget": (1000, 0, 0), "normal": (1000, 0, 0), "random": (4, 0, 0)}


def test_a_book_and_wikitext(shared: Path, place: Path, facts: TokenizerFacts) -> None:
    """All text arrives: what the windows hold, shared tokens left out, is the file to the letter."""
    chosen = recipe("copyright-book", shared)
    streams = prepare_streams(chosen, facts, place)
    encoder = Encoder(facts, data_settings(chosen.data))
    for prepared, name in ((streams.forget, "tinyshakespeare/input.txt"), (streams.normal, "wikitext2/valid.txt")):
        text = (shared / name).read_text()
        rows = PreparedRows(prepared.folder)
        end = 0
        for i in range(len(rows)):
            window = encoder.decode([*rows.prompt(i), *rows.answer(i)]).strip("�")
            at = text.find(window, max(0, end - 3000))
            assert 0 <= at <= end + 1, (name, i)
            end = max(end, at + len(window))
        assert end >= len(text) - 1
    assert summary_of(streams.forget)["longest_answer"] == 128


@pytest.mark.parametrize("name", ["tofu-forget10", "harmful-hh-rlhf", "hallucination-halueval", "copyright-book"])
def test_what_a_person_sees(shared: Path, place: Path, facts: TokenizerFacts, name: str) -> None:
    chosen = recipe(name, shared)
    streams = prepare_streams(chosen, facts, place)
    lines = described(streams).splitlines()
    assert lines[0].split() == [
        "set",
        "rows",
        "set",
        "aside",
        "filtered",
        "tokens",
        "longest",
        "prompt",
        "longest",
        "answer",
    ]
    assert max(map(len, lines)) < 200
    shown = preview(streams.forget, Encoder(facts, data_settings(chosen.data)), 2)
    assert len(shown) == 2
    assert all("[" in text and text.endswith("]") and "|" in text for text in shown)


def test_overlap_of_real_sets_is_found(shared: Path, place: Path, facts: TokenizerFacts) -> None:
    normal = "data.normal=[{type: files, path: tofu/full.json}]"
    with pytest.raises(DataError, match=r"400 normal row\(s\) stand in forget too \(exactly: 400"):
        prepare_streams(recipe("tofu-forget10", shared, normal), facts, place)
    streams = prepare_streams(recipe("tofu-forget10", shared, normal, "data.overlap=drop_from_normal"), facts, place)
    assert len(PreparedRows(streams.normal.folder, streams.without)) == 3600
    assert "normal: 400 rows that stand in forget too" in described(streams)


def test_a_response_that_cannot_fit_is_told_before_anything_runs(shared: Path, place: Path, facts) -> None:
    long = f"data.random=[{{type: fixed, texts: [{'no ' * 100}]}}]"
    with pytest.raises(DataError, match=r"longest random response does not fit .*\(tokens=155\)"):
        prepare_streams(recipe("tofu-forget10", shared, long, "data.max_tokens=140"), facts, place)


@pytest.mark.slow
def test_the_command_takes_sets_out_of_s3(bucket: Any, base: Path, tmp_path: Path) -> None:
    for name, count in (("forget/a.jsonl", 3), ("forget/b.jsonl", 4), ("normal.jsonl", 5)):
        lines = [json.dumps({"question": f"{name} {i}?", "answer": "Yes."}) for i in range(count)]
        with bucket.open_output_stream(f"bucket/{name}") as stream:
            stream.write("\n".join(lines).encode())
    content = {
        "name": "s3", "storage": str(tmp_path), "models": {"original": {"type": "pretrained", "path": str(base)}},
        "data": {
            "folder": "s3://bucket", "max_tokens": 100,
            "forget": [{"type": "files", "path": "forget/*.jsonl"}],
            "normal": [{"type": "files", "path": "normal.jsonl"}],
        },
        "objective": {"forget": {"type": "gradient_ascent"}, "normal": {"type": "nll"}},
    }  # fmt: skip
    (tmp_path / "s3.yaml").write_text(yaml.safe_dump(content))
    done = command("prepare", str(tmp_path / "s3.yaml"), "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "\nforget     7  " in done.stdout
    assert "\nnormal     5  " in done.stdout
    assert "forget/a.jsonl 0?␤Answer:[" in done.stdout


def test_the_command(shared: Path, tmp_path: Path, cluster_address: str) -> None:
    done = command(
        "prepare", str(RECIPES / "tofu-forget10.yaml"), f"data.folder={shared}", f"storage={tmp_path}",
        f"models.original.path={shared / 'gpt2-tokenizer'}", "--show", "1",
        RAY_ADDRESS=cluster_address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\nforget    400          0         0" in done.stdout
    assert "Answer:[ The| author|'s| full| name|" in done.stdout
    assert not done.stderr
