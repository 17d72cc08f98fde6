import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import AdamW, Data, Soul, config_hash, run_name
from components.errors import ConfigError
from components.load_config import load_recipe, merge, parse_override, read_yaml
from pipelines import tune
from pipelines.cli import parse_arguments
from pipelines.compare import cells_of
from pipelines.compare import main as compare

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "pipelines" / "recipes" / "demo.yaml"


def test_all_mistakes_are_told_at_once_with_path_and_nearest_key() -> None:
    overrides = ["train.wrkers=3", "train.epochs=0", "optimizer.gama=1", "objective.normal.type=kl", "foo=1"]
    with pytest.raises(ConfigError) as error:
        load_recipe([DEMO], overrides)
    text = str(error.value)
    assert "train.wrkers: unknown key. Did you mean workers?" in text
    assert "train.epochs: Input should be greater than or equal to 1 (got 0)" in text
    assert "optimizer.soul.gama: unknown key. Did you mean gamma?" in text
    assert "objective.normal: needs a type, one of 'kl_to_original', 'nll'" in text
    assert "foo: unknown key." in text
    assert "pydantic" not in text


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {epochs: 7}\nseed: 3\n")
    recipe = load_recipe([DEMO, tmp_path / "more.yaml"], ["seed=4", "optimizer.lr=1e-5"])
    assert (recipe.train.epochs, recipe.seed, recipe.optimizer.lr) == (7, 4, 1e-5)
    assert recipe.train.batch_size == load_recipe([DEMO]).train.batch_size


def test_a_changed_type_drops_the_other_types_keys() -> None:
    recipe = load_recipe([DEMO], ["optimizer.type=adamw", "optimizer.lr=1e-3"])
    assert recipe.optimizer == AdamW(type="adamw", lr=1e-3)
    assert isinstance(load_recipe([DEMO]).optimizer, Soul)
    assert merge({"a": {"type": "x", "p": 1}}, {"a": {"q": 2}}) == {"a": {"type": "x", "p": 1, "q": 2}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.forget.weight=0.3", {"objective.forget.weight": 0.3, "objective.normal.type": "kl_to_original"}),
        ("objective.random.responses=2", {"objective.random.responses": 2, "objective.forget.weight": 0.1}),
        ("objective.normal.weight=2", {"objective.normal.weight": 2.0, "objective.random.weight": 1.0}),
        ("objective.random=null", {"objective.random": None, "objective.forget.type": "gradient_ascent"}),
        ("objective.forget.type=npo", {"objective.forget.beta": 0.1, "objective.normal.type": "kl_to_original"}),
        ("objective.forget.weight.end=1", None),  # the default is a number, which has no end
        ("optimizer.lr=1e-6", {"optimizer.lr": 1e-6, "optimizer.type": "soul"}),
        ("optimizer.preset=soul-release", {"optimizer.preset": "soul-release", "optimizer.type": "soul"}),
        ("optimizer.type=adamw", {"optimizer.type": "adamw", "optimizer.lr": 1e-4}),
        ("attacks.relearn.optimizer.lr=0.5", {"attacks.relearn.optimizer.lr": 0.5, "attacks.relearn.share": 0.2}),
        ("finetune.optimizer.lr=0.5", {"finetune.optimizer.lr": 0.5, "finetune.optimizer.type": "adamw"}),
        ("train.probe.every=3", {"train.probe.every": 3, "train.probe.rows": 32}),
    ],
)
def test_an_override_changes_a_default_as_it_changes_what_a_file_says(override: str, expected: Any) -> None:
    tofu, base = DEMO.with_name("tofu-forget10.yaml"), "finetune.base.type=scratch"
    if expected is None:
        with pytest.raises(ConfigError, match=r"needs a type, one of 'ramp', 'balanced', 'dual'"):
            load_recipe([tofu], [override])
        return
    recipe = load_recipe([tofu], [override, base])
    for path, value in expected.items():
        assert functools.reduce(getattr, path.split("."), recipe) == value, path
    # and nothing else is another one than by default
    plain = load_recipe([tofu], [base])
    section = override.partition(".")[0]
    left = {section: True, "name": True}
    assert recipe.model_dump(exclude=left) == plain.model_dump(exclude=left)


def test_a_section_that_a_file_gives_stays_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "only.yaml").write_text("objective: {forget: {type: npo}, normal: {type: nll}}")
    recipe = load_recipe([DEMO.with_name("tofu-forget10.yaml"), tmp_path / "only.yaml"], ["objective.normal.weight=3"])
    assert recipe.objective.random is None
    assert (recipe.objective.forget.type, recipe.objective.normal.weight) == ("npo", 3.0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"objective.random.type: Field required"):
        load_recipe([DEMO.with_name("tofu-forget10.yaml"), tmp_path / "only.yaml"], ["objective.random.weight=3"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nname: a\nseed: 2\n", r"'seed' is named twice in one section \(line 3\)"),
        ("train: {steps: 1, workers: 0, steps: 2}", r"'steps' is named twice in one section \(line 1\)"),
        ("gates:\n  - metric: a\n    min: 0\n    metric: b\n", r"'metric' is named twice in one section \(line 4\)"),
        ('a: &x {b: 1, "b": 2}\nc: *x', r"'b' is named twice"),
    ],
)
def test_a_key_named_twice_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_recipe([tmp_path / "twice.yaml"])
    (tmp_path / "shared.yaml").write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: [*x, *x]\n")
    assert read_yaml(tmp_path / "shared.yaml") == {"a": {"b": 1}, "c": {"b": 2}, "d": [{"b": 1}, {"b": 1}]}


def test_override_values_are_yaml_and_may_hold_equals() -> None:
    assert parse_override("a.b=c=d") == {"a": {"b": "c=d"}}
    assert parse_override("a=null") == {"a": None}
    assert parse_override("a=[1, 2]") == {"a": [1, 2]}
    for wrong in ("a", "=1", "a=[1", "a=2026-13-01", "a=" + "[" * 500, "a." * 500 + "b=1"):
        with pytest.raises(ConfigError):
            parse_override(wrong)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*demo\.yaml"):
        load_recipe([DEMO.with_name("dmo.yaml")])


def test_parts_that_do_not_fit_are_refused() -> None:
    for override, words in (
        ("data.forget=[]", "objective.forget needs rows"),
        ("finetune=null", "no original model"),
        ("objective={forget: null, random: null, normal: {type: nll}}", "nothing would be unlearned"),
        ("objective.normal=null", "curvature_of=normal needs objective.normal"),
        ("train={dtype: bf16, zero_stage: 0}", "fp32 master weights"),
        ("gates=[{metric: x, min: 1, max: 2}]", "exactly one of"),
        ("evaluation.utility=[nowhere]", "not among the sets"),
        ("evaluation.sets.forget={normalised: true, rows: [{type: people, split: forget}]}", "needs wrong answers"),
        ("data.template='{question}'", "String should match pattern"),
        ("optimizer.betas=[0.9, 1.0]", "less than 1"),
        ("seed=-1", "greater than or equal to 0"),
        ("finetune.optimizer={type: soul, curvature_of: forget}", "fine-tuning has normal rows only"),
        ("train.gpus_per_worker=2", "Input should be 0 or 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_recipe([DEMO], [override])


def test_hash_follows_the_result_and_nothing_else() -> None:
    recipe = load_recipe([DEMO])
    same = load_recipe([DEMO], ["storage=/elsewhere", "train.log_every=9", "tracking.experiment=x", "if_exists=new"])
    other = load_recipe([DEMO], ["seed=1"])
    assert config_hash(recipe) == config_hash(same) != config_hash(other)
    assert run_name(recipe) == f"gradient-ascent+random-response+kl-to-original-soul-demo-{config_hash(recipe)}"


@pytest.mark.parametrize("arguments", [["--help"], [str(DEMO), "--dry-run"]])
@pytest.mark.parametrize("pipeline", ["prepare", "finetune", "unlearn", "evaluate", "promote"])
def test_help_and_dry_run_load_no_framework(pipeline: str, arguments: list[str]) -> None:
    """Hence they are instant."""
    code = (
        f"import sys, runpy; sys.argv = ['{pipeline}.py', *{arguments}]\n"
        f"try: runpy.run_path('pipelines/{pipeline}.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'mlflow', 'datasets', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_readmes_data_section_is_one() -> None:
    block = (ROOT / "README.md").read_text().split("```\ndata:\n")[1].split("```")[0]
    data = Data.model_validate(yaml.safe_load("data:\n" + block)["data"])
    assert [source.type for source in (*data.forget, *data.normal)] == ["files", "text", "huggingface"]
    assert data.random == data.normal


@pytest.mark.parametrize("recipe", sorted((ROOT / "pipelines" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_with_and_without_its_files(recipe: Path) -> None:
    assert load_recipe([recipe]).name == recipe.stem
    local = load_recipe([recipe], ["data.folder=/nowhere"])
    sources = [*local.data.forget, *local.data.normal, *local.data.random]
    sources += [source for questions in local.evaluation.sets.values() for source in questions.rows]
    for source in sources:
        assert source.type != "huggingface"
        assert source.type in ("people", "fixed") or str(source.path).startswith("/nowhere/")


def test_a_hub_data_sets_local_copy_may_be_a_saved_folder(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    source = "data.forget=[{type: huggingface, path: owner/name, subset: x, split: test, local: saved, answer: a}]"
    [found] = load_recipe([DEMO], [source, f"data.folder={tmp_path}"]).data.forget
    assert (found.type, found.path, found.subset, found.split) == ("huggingface", str(tmp_path / "saved"), None, "test")
    assert found.answer == "a"
    source = source.replace("saved", "x/*.jsonl")
    [found] = load_recipe([DEMO], [source, "data.folder=s3://bucket/data/"]).data.forget
    assert (found.type, found.path) == ("files", "s3://bucket/data/x/*.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompt: '{a'", "is neither a column nor a text with columns in braces"),
        ("answer: '{}'", "has empty braces"),
        ("where: 'a =='", "is not an expression"),
        ("format: xml", "Input should be 'auto'"),
    ],
)
def test_mistakes_in_a_source_are_told(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe([DEMO], [f"data.forget=[{{type: files, path: x, {change}}}]"])


def test_the_readmes_commands_are_accepted() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("python pipelines/")]
    assert len(commands) >= 8
    for _, pipeline, *arguments in commands:
        assert (ROOT / pipeline).exists()
        given = [str(ROOT / argument) if argument.endswith(".yaml") else argument for argument in arguments]
        chosen = [argument for argument in given if ".yaml" in argument or "=" in argument]
        sweep = pipeline.endswith("/tune.py")
        parsed = tune.parse(chosen) if sweep else parse_arguments(chosen, takes_words="evaluate" in pipeline)
        assert parsed.recipe


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer={type: adafactor}"], "adafactor factors matrices, but ZeRO 3 hands it flat pieces"),
        (["optimizer.curvature=hutchinson"], "hutchinson differentiates twice, which ZeRO 3 cannot"),
        (["optimizer={type: influence}"], "influence needs the gradient's true size"),
        (["optimizer={type: influence}", "train.schedule=linear"], "influence moves once: give neither warm-up nor"),
        (["train.zero_stage=0", "train.offload=optimizer"], "offload=optimizer needs zero_stage 1, 2 or 3"),
        (["train.zero_stage=2", "train.offload=parameters"], "offload=parameters needs zero_stage 3"),
        (["train.lora={}", "train.trainable=norm"], "lora trains its adapters only"),
        (["train.trainable='('"], "is not a regular expression"),
        (["objective.forget={type: nll}"], "give both (task-vector negation) or neither"),
        (
            ["objective.forget={type: nll}", "objective.negate=1.0"],
            "negate subtracts all that is learnt: set objective.random=null",
        ),
        (["mask={type: wagle}", "train.lora={}"], "mask chooses among the model's weights"),
        (["mask={type: wagle}", "objective.forget={type: kl_ascent}"], "mask needs a gradient at the original"),
        (["objective.forget.weight={type: dual, bound: 1}"], "a constraint is on what is to be kept"),
        (["train.gradient_cosine_every=2", "objective.forget=null"], "gradient_cosine_every needs objective.forget"),
        (["optimizer.adaptive={soonest: 9}"], "soonest must be below hessian_interval=5"),
        (
            ["optimizer.curvature=hutchinson", "optimizer.batch_factor=2", "train.zero_stage=2"],
            "batch_factor multiplies squared gradients",
        ),
        (["objective.negate=1.0"], "give both (task-vector negation) or neither"),
        (
            ["objective.forget={type: dpo}", "objective.random=null", "data.random=[]"],
            "dpo prefers the answers",
        ),
        (["data.responses=by_row", "objective.random.responses=2"], "by_row gives one response a row"),
        (["objective.forget.weight={type: balanced}"], "forget.weight=balanced is measured against the forget term's"),
        (
            ["objective.forget={type: rmu, layer: 1}", "objective.normal={type: embedding_difference, layer: 2}"],
            "activations of several layers [1, 2]",
        ),
        (
            ["mask={type: wagle}", "objective.normal=null", "optimizer.curvature_of=all"],
            "mask weighs the forget",
        ),
        (["optimizer.adaptive={low: 0.5, high: 0.2}"], "low 0.5 must be below high 0.2"),
        (["optimizer={type: sgd, momentum: 0, nesterov: true}"], "nesterov needs a momentum above 0"),
        (["finetune.optimizer={type: influence}"], "influence is a method to forget"),
        (["optimizer.curvature_of=forget", "objective.forget=null"], "curvature_of=forget needs objective.forget"),
        (["objective.forget={type: custom, import_path: nodots}"], "String should match pattern"),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([DEMO], overrides)
    assert told in str(caught.value)


@pytest.mark.parametrize("method", sorted((DEMO.parent / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_is_a_recipe_on_top_of_another(method: Path) -> None:
    """Nothing of the other recipe's objective is left: each names all three terms with their weights."""
    written = yaml.safe_load(method.read_text())["objective"]
    assert {"forget", "random", "normal"} <= {*written}
    assert all("weight" in term for term in (written[g] for g in ("forget", "random", "normal")) if term)
    recipe = load_recipe([DEMO, method], ["optimizer.type=adamw"])
    assert {g: term.type for g, term in recipe.objective.terms().items()} == {
        g: written[g]["type"] for g in ("forget", "random", "normal") if written[g]
    }


@pytest.mark.parametrize("file", sorted((DEMO.parent / "comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_comparison_is_a_recipe(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {path.stem for path in (DEMO.parent / "methods").glob("*.yaml")}
    assert {cell.row for cell in cells_of(file, [])} == methods
    assert compare([str(file), "--dry-run", "train.steps=3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 44
    assert all(line.startswith("python pipelines/unlearn.py ") and line.endswith(" train.steps=3") for line in printed)
    assert compare([str(file), "--dry-run", "train.stepps=3"]) == 2
    assert "Did you mean steps?" in capsys.readouterr().err


def test_a_comparison_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("recipes: [demo.yaml]\ncolumns: {SOUL: []}\nrows: {npo: {columns: {AdamW: []}}}\n")
    assert compare([str(file)]) == 2
    assert "rows name columns ['AdamW'], which are not among ['SOUL']" in capsys.readouterr().err
    assert compare([str(DEMO.parent / "comparisons" / "demo.yaml"), "--into", str(file)]) == 2
    assert "between which the table would stand" in capsys.readouterr().err


NINE = ",".join(["*{}"] * 9)
DOUBLED = ["x0: &x0 [" + "x," * 9 + "]", *(f"x{i}: &x{i} [{NINE}]".replace("{}", f"x{i - 1}") for i in range(1, 12))]
MERGED = ["x0: &x0 {a: 1}", *(f"x{i}: &x{i} {{<<: [{NINE}]}}".replace("{}", f"x{i - 1}") for i in range(1, 12))]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n".join([*DOUBLED, "name: *x11"]), "its aliases"),
        ("\n".join([*DOUBLED, "data: {forget: *x11}"]), "its aliases"),
        ("\n".join([*MERGED, "data: *x11"]), "its aliases"),
        ("name: &a [*a]", "its aliases"),
        ("train: &a {b: &c [*a], d: *c}", "its aliases"),
        ("a: &a '" + "x" * 1000 + "'\nname: [" + "*a," * 1000 + "]", "its aliases"),
        ("name: " + "[" * 500, "nested too deeply"),
        ("name: " + "{a: " * 500, "nested too deeply"),
        ("name: " + "x" * 300_000, "300,006 characters"),
        ("seed: 2026-13-01", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "5000 digits"),
        ("seed: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ],
)
@pytest.mark.parametrize("kind", ["recipe", "suite", "space", "comparison"])
def test_yaml_that_is_small_only_in_its_file_is_refused_at_once(
    tmp_path: Path, kind: str, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    read = {
        "recipe": lambda: load_recipe([DEMO, file]),
        "suite": lambda: load_recipe([DEMO], suites=[file]),
        "space": lambda: tune.parse([str(DEMO), str(file)]),
        "comparison": lambda: cells_of(file, []),
    }[kind]
    with pytest.raises(ConfigError) as caught:
        read()
    assert told in str(caught.value)
    assert "is not YAML" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_that_repeat_little_are_taken(tmp_path: Path) -> None:
    recipe = tmp_path / "more.yaml"
    recipe.write_text("data: {normal: &n [{type: people, split: normal}], random: *n}\n")
    assert len({str(part) for part in (lambda d: (d.normal, d.random))(load_recipe([DEMO, recipe]).data)}) == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("name=" + "n" * 300, "choose one of at most 164"),
        ("name=" + "n" * 165, "choose one of at most 164"),
        ("storage=/tmp/" + "s" * 300 + "/runs", "storage: has a name of 300 bytes"),
        ("storage=" + "é" * 128, "storage: has a name of 256 bytes"),
        ("storage=" + "a/" * 2100, "storage: has 4,200 bytes"),
        ('storage="a\\0b"', "storage: has a NUL character"),
        (
            "data={folder: " + "f" * 256 + ", forget: [{type: huggingface, path: x, local: y}]}",
            "has a name of 256 bytes",
        ),
        ("data.requests=" + "r" * 256, "has a name of 256 bytes"),
        ("data.forget=[{type: files, path: [a, " + "p" * 256 + "]}]", "data.forget.0.files.path: has a name of 256"),
        ("data.forget=[{type: text, path: " + "p" * 256 + "}]", "data.forget.0.text.path: has a name of 256"),
        ("models.original={type: pretrained, path: " + "m" * 256 + "}", "has a name of 256 bytes"),
        ("train.checkpoint_storage=" + "c" * 256, "train.checkpoint_storage: has a name of 256 bytes"),
        ("tracking.registered_model=" + "m" * 201, "the registered model's name has 201 characters"),
    ],
)
def test_names_that_no_file_system_takes_are_refused_with_the_recipe(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([DEMO], [override])
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "name=" + "n" * 164,
        "storage=" + "é" * 127,
        "data.forget=[{type: files, path: 's3://bucket/" + "k" * 500 + "', prompt: q, answer: a}]",
        "data.forget=[{type: files, path: '[" + "ab" * 200 + "].jsonl', prompt: q, answer: a}]",
        "tracking.registered_model=" + "m" * 200,
    ],
)
def test_the_longest_names_are_taken(override: str, tmp_path: Path) -> None:
    recipe = load_recipe([DEMO], [override])
    (tmp_path / f"{run_name(recipe)}-999.partial-12345678").mkdir()


@pytest.mark.parametrize("path", ["x" * 300 + ".yaml", "d/" * 3000 + "x.yaml", "folder.yaml", "a/file.yaml/x.yaml"])
def test_a_recipe_that_cannot_be_read_is_a_mistake_of_the_command(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.yaml").touch()
    with pytest.raises(ConfigError, match=r"cannot be read|does not exist"):
        load_recipe([tmp_path / path])


def test_a_sweeps_name_and_a_grids_size_are_checked_with_the_space(tmp_path: Path) -> None:
    def parse(name: str, count: int) -> None:
        file = tmp_path / f"{name}.yaml"
        searched = {f"objective.{g}.weight": {"grid": [0.1 + i for i in range(count)]} for g in ("forget", "normal")}
        file.write_text(yaml.safe_dump({"space": searched, "search": {"type": "grid"}}))
        tune.plan(tune.parse([str(DEMO), str(file)]))

    parse("n" * 200, 3)
    with pytest.raises(ConfigError, match="Sweep's folder name would be too long"):
        parse("n" * 245, 3)
    with pytest.raises(ConfigError, match="The grid has 40,000 points"):
        parse("grid", 200)
