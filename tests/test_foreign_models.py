"""Model folders that others made: loaded whole, or refused by what is wrong with them; their code is never run."""

import ast
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from components import model_files, models
from components.config import Lora
from components.errors import ModelError
from components.load_config import load_recipe
from components.model_files import check_files, config_problems, parameter_count, stored_tensors
from components.models import check_model, load_classifier, load_model, load_tokenizer, save_model
from components.training import trainable
from pipelines import attack, evaluate, finetune, unlearn
from pipelines.cli import run_cli
from tests.families import tiny_folder
from tests.test_pipelines import SMALL

ROOT = Path(__file__).resolve().parents[1]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
NEO = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128}
MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny tied Llama with its tokenizer."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    changed = {name: t.clone() for name, t in change(load_file(folder / "model.safetensors")).items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def saved(model: Any, base: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


def causal(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def classifier(config: Any) -> Any:
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [check_model, load_model])
@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"tie_word_embeddings": False}, None, r"missing: lm_head\.weight"),
        ({"num_hidden_layers": 6}, None, r"missing: model\.layers\.2\.input_layernorm\.weight.* and \d+ more"),
        ({"num_hidden_layers": 1}, None, r"superfluous: model\.layers\.1\.input_layernorm\.weight"),
        ({"hidden_size": 16}, None, r"of another shape: model\.embed_tokens\.weight \(400, 32\), not \(400, 16\)"),
        ({"vocab_size": 300}, None, r"model\.embed_tokens\.weight \(400, 32\), not \(300, 32\)"),
        ({"num_key_value_heads": 1}, None, r"of another shape: model\.layers\.0\.self_attn\.k_proj\.weight"),
        ({"attention_bias": True}, None, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({}, lambda t: {**t, "score.weight": torch.ones(3, 32)}, r"superfluous: score\.weight"),
        ({}, lambda t: {**t, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}, r"up_proj\.weight_scale"),
        ({}, lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, r"missing: model\.norm\.weight"),
        ({"model_type": "mistral"}, lambda t: {**t, "vision.proj": torch.ones(2)}, r"superfluous: vision\.proj"),
    ],
)  # fmt: skip
def test_stored_tensors_are_exactly_the_models(folder: Path, config: Any, tensors: Any, told: str, read: Any) -> None:
    change_json(folder / "config.json", **config)
    if tensors:
        change_tensors(folder, tensors)
    with pytest.raises(ModelError, match=told) as error:
        read(folder)
    assert f"path={folder}" in str(error.value)


def test_models_of_another_kind_are_refused(base: Path, tmp_path: Path) -> None:
    llama = transformers.LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0)
    bert = transformers.BertConfig(**SIZES, intermediate_size=48, num_labels=3)
    judge = saved(classifier(llama), base, tmp_path / "judge")
    headless = saved(transformers.LlamaModel(llama), base, tmp_path / "headless")
    whole = saved(causal(llama), base, tmp_path / "causal")
    untrained = saved(transformers.BertModel(bert, add_pooling_layer=False), base, tmp_path / "untrained")
    for read in (check_model, load_model):
        with pytest.raises(ModelError, match=r"missing: lm_head\.weight; superfluous: score\.weight"):
            read(judge)
        with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
            read(headless)
        read(whole)
    for read in (lambda path: check_model(path, "classifier"), load_classifier):
        with pytest.raises(ModelError, match=r"missing: score\.weight; superfluous: lm_head\.weight"):
            read(whole)
        with pytest.raises(ModelError, match=r"missing: bert\.pooler.*|missing: classifier\.bias"):
            read(untrained)
        read(judge)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        # tied heads, stored or not; names without the base model's prefix
        (lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), lambda t: t),
        (lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
         lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}),
        (lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
         lambda t: {name.removeprefix("model."): v for name, v in t.items()}),
        (lambda: transformers.GPT2Config(**GPT2),
         lambda t: {**{name.removeprefix("transformer."): v for name, v in t.items()}, "h.0.attn.bias": MASK}),
        # constants that older versions stored
        (lambda: transformers.LlamaConfig(**LLAMA),
         lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        (lambda: transformers.GPT2Config(**GPT2),
         lambda t: {**t, "transformer.h.1.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}),
        (lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
         lambda t: {**t, "gpt_neox.layers.0.attention.bias": MASK}),
        (lambda: transformers.GPTNeoConfig(vocab_size=400, hidden_size=32, num_layers=2, num_heads=2, **NEO),
         lambda t: {**t, "transformer.h.0.attn.attention.bias": MASK,
                    "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)}),
        (lambda: transformers.CodeGenConfig(**{**GPT2, "n_head": 4}, rotary_dim=8),
         lambda t: {**t, "transformer.h.0.attn.causal_mask": MASK}),
        (lambda: transformers.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=2), lambda t: t),
    ],
    ids=["tied", "tied, stored", "no prefix", "gpt2 of the hub", "inv_freq", "gpt2", "neox", "neo", "codegen", "bloom"],
)  # fmt: skip
def test_what_is_rightly_absent_or_without_effect_loads(make: Any, change: Any, base: Path, tmp_path: Path) -> None:
    model = causal(make())
    place = saved(model, base, tmp_path / "model")
    change_tensors(place, change)
    check_model(place)
    probe = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(load_model(place)(input_ids=probe).logits, model(input_ids=probe).logits)


def test_only_a_mask_passes_for_one(base: Path, tmp_path: Path) -> None:
    place = saved(causal(transformers.GPT2Config(**GPT2)), base, tmp_path / "model")
    change_tensors(place, lambda t: {**t, "transformer.h.0.attn.masked_bias": torch.ones(32)})
    with pytest.raises(ModelError, match=r"superfluous: transformer\.h\.0\.attn\.masked_bias"):
        load_model(place)


def test_a_classifier_may_keep_its_encoders_pooling_layer(base: Path, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, intermediate_size=48, num_labels=3)
    place = saved(classifier(config), base, tmp_path / "judge")
    change_tensors(place, lambda t: {**t, "roberta.pooler.dense.weight": torch.ones(32, 32)})
    check_model(place, "classifier")
    load_classifier(place)


def test_sharded_folders_load_and_miss_no_shard(folder: Path, tmp_path: Path) -> None:
    load_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "sharded" / name)
    sharded = tmp_path / "sharded"
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check_model(sharded)
    load_model(sharded)
    assert parameter_count(sharded) == parameter_count(folder)
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "consolidated.safetensors")  # none of the model's
    assert parameter_count(sharded) == parameter_count(folder)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": {"a": "../x"}}))
    with pytest.raises(ModelError, match="has no weight_map"):
        check_files(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    gone = sorted(sharded.glob("model-*"))[1]
    gone.unlink()
    for read in (check_files, load_model, parameter_count):
        with pytest.raises(ModelError, match=rf"incomplete .*missing={gone.name}"):
            read(sharded)


@pytest.mark.parametrize("wrong", ["missing", "superfluous", "both"])
def test_trained_adapters_are_merged_whole(make_job: Any, wrong: str) -> None:
    lora = Lora(rank=2, targets=["q_proj", "v_proj"])
    job = make_job("adapters")
    job = job.model_copy(update={"train": job.train.model_copy(update={"lora": lora})})
    model = load_model(Path(job.model))
    trainable.add_adapters(model, lora, 0)
    state = model.state_dict()
    first = next(name for name in state if "lora_A" in name)
    if wrong != "superfluous":
        tensor = state.pop(first)
    if wrong != "missing":
        state[f"other.{first}"] = state[first].clone() if first in state else tensor
    told = {
        "missing": f"missing: {first}",
        "superfluous": f"superfluous: other.{first}",
        "both": "missing.*superfluous",
    }
    with pytest.raises(ModelError, match=told[wrong]):
        trainable.save_result(job, model, state, Path(job.output))
    assert not Path(job.output).exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_no_model(folder: Path, whole: bool) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/name"}')
    if not whole:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    for read in (check_files, check_model, load_model, load_classifier):
        with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\): merge it"):
            read(folder)


# --- code -------------------------------------------------------------------------------------------------------------

OPENS = {"from_pretrained", "from_config"}


def test_every_model_comes_through_one_door() -> None:
    """Nobody else calls what may ask for the right to run a folder's code, and the door never gives it."""
    found = {}
    for file in (*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")):
        tree = ast.parse(file.read_text())
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in OPENS]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in OPENS]
        assert len(attributes) == len(calls), file  # none is handed on
        words = {w.value for w in ast.walk(tree) if isinstance(w, ast.Constant) and isinstance(w.value, str)}
        assert not words & OPENS, file
        names = {getattr(node, "id", getattr(node, "name", None)) for node in ast.walk(tree)}
        assert not names & {"pipeline", "PeftModel", "load_adapter"}, file
        if calls:
            found[file.relative_to(ROOT).as_posix()] = calls
    [calls] = found.values()
    for call in calls:
        given = {word.arg: word.value for word in call.keywords}
        assert ast.literal_eval(given["trust_remote_code"]) is False, ast.unparse(call)
        assert call.func.attr == "from_config" or ast.literal_eval(given["local_files_only"]) is True  # type: ignore[attr-defined]
    [door] = [n for n in ast.parse(Path(models.__file__).read_text()).body if getattr(n, "name", "") == "_from_folder"]
    assert {call.lineno for call in calls} <= set(range(door.lineno, door.end_lineno + 1))  # type: ignore[operator,attr-defined]


MARK = "import pathlib; pathlib.Path(__file__).with_name('RAN').write_text('x')\nclass C: pass\n"
OWN_CODE: dict[str, Callable[[Path], None]] = {
    "config": lambda f: change_json(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.C"}),
    "model": lambda f: change_json(f / "config.json", auto_map={"AutoModelForCausalLM": "own.C"}, model_type="t5"),
    "classifier": lambda f: change_json(
        f / "config.json", auto_map={"AutoModelForSequenceClassification": "own.C"}, model_type="own"
    ),
    "tokenizer": lambda f: change_json(
        f / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.C", None]}
    ),
    "tokenizer, old": lambda f: change_json(
        f / "tokenizer_config.json", tokenizer_class="Own", auto_map=["own.C", "own.C"]
    ),
    "hub": lambda f: change_json(
        f / "config.json", model_type="own", auto_map={"AutoConfig": "owner/name--own.C", "AutoTokenizer": ["o--own.C"]}
    ),
    "kernel": lambda f: change_json(f / "config.json", attn_implementation="owner/kernel"),
}


@pytest.fixture(scope="module")
def with_code(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("code")
    for name, change in OWN_CODE.items():
        shutil.copytree(base, place / name)
        change(place / name)
        (place / name / "own.py").write_text(MARK)
        (place / name / "custom_generate").mkdir()
        (place / name / "custom_generate" / "generate.py").write_text(MARK)
    return place


def test_a_folders_code_is_neither_run_nor_asked_about(with_code: Path) -> None:
    """In a process whose terminal answers y to everything."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from components.errors import ModelError\n"
        "from components import models\n"
        "from components.evaluation.judge import Judge\n"
        "import transformers; longest = 0.0\n"
        "reads = {f.__name__: f for f in (models.check_model, models.load_model, models.load_tokenizer,\n"
        "    models.load_classifier, models.layer_count)}\n"
        "reads['judge'] = lambda folder: Judge(str(folder), 'x')\n"
        "for folder in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    for name, read in reads.items():\n"
        "        began = time.perf_counter()\n"
        "        try: read(folder)\n"
        "        except ModelError as error: print(folder.name, name, error)\n"
        "        else: print(folder.name, name, 'read')\n"
        "        longest = max(longest, time.perf_counter() - began)\n"
        "print(longest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(with_code)], input="y\n" * 100, capture_output=True, text=True, cwd=ROOT,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *lines, longest = done.stdout.splitlines()
    assert float(longest) < 10  # transformers waits 15 s for an answer
    assert "Do you wish" not in done.stdout + done.stderr
    assert not list(with_code.rglob("RAN"))
    told = {" ".join(line.split()[:2]): line for line in lines if not line.startswith(("tokenizer,", "t5"))}
    for start in ("config check_model", "config layer_count", "hub load_model", "model load_model",
                  "tokenizer load_tokenizer", "tokenizer check_model", "classifier load_classifier",
                  "classifier judge", "kernel load_model"):  # fmt: skip
        assert "which is never run" in told[start], told[start]
    [old] = [line for line in lines if line.startswith("tokenizer, old load_tokenizer")]
    assert "which is never run" in old


def test_the_main_command_refuses_a_folders_code_at_once(with_code: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, with_code / "tokenizer")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "unlearn.py"), str(recipe)], input="y\ny\n", capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("ModelError: Tokenizer cannot be loaded")
    assert done.stderr.count("\n") == 1
    assert "which is never run" in done.stderr
    assert "Do you wish" not in done.stdout
    assert not list(with_code.rglob("RAN"))
    assert time.monotonic() - began < 60  # importing torch included; asking alone would take 15 s more


def test_the_harness_gets_a_model_that_is_loaded_already(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval loads models by itself otherwise: with weights made up, and code of the folder where it is asked to."""
    import types

    from components.config import LmEval
    from components.evaluation.general import general_ability

    given: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> Any:
        given.update(options)
        return {"results": {"task": {"acc,none": 0.5}}}

    class Wrapped:
        def __init__(self, model: Any, **options: Any):
            given.update(options, pretrained=model)

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = lambda **options: None  # type: ignore[attr-defined]
    modules["lm_eval.models.huggingface"].HFLM = Wrapped  # type: ignore[attr-defined]
    for name, module in {**modules, "lm_eval.models": types.ModuleType("lm_eval.models")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert general_ability(folder, "hash", LmEval(tasks=["task"]), tmp_path) == {"lm_eval_task_acc": 0.5}
    assert isinstance(given["model"], Wrapped)
    assert isinstance(given["pretrained"], torch.nn.Module)
    assert not isinstance(given["tokenizer"], str)
    change_json(folder / "config.json", num_hidden_layers=6)
    with pytest.raises(ModelError, match="missing"):
        general_ability(folder, "other", LmEval(tasks=["task"]), tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------


def header(text: bytes, data: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(shape: Any, end: Any = 4) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LFS.encode(), "Git LFS pointer"),
        (b"", "cut short or empty"),
        (b"1234567", "cut short or empty"),
        (header(b"{}", length=2**62), "header of 4,611,686,018,427,387,904 bytes"),
        (header(b"{}", length=2**63 + 1), "no safetensors file"),
        (header(b"{}", length=99_000_000), "no safetensors file or cut short"),
        (b"<!DOCTYPE html><html>Not found</html>", "no safetensors file"),
        (header(b"not json"), r"damaged header \(JSONDecodeError"),
        (header(b"[" * 100_000), r"damaged header \(RecursionError"),
        (header(b"\xff\xfe"), r"damaged header \(UnicodeDecodeError"),
        (header(b"[]"), "damaged header"),
        (header(b'{"a": 5}'), "damaged header"),
        (header(b'{"a": {"dtype": "F32"}}'), "damaged header"),
        (header(entry([-1]), 4), "damaged header"),
        (header(entry(["1"]), 4), "damaged header"),
        (header(entry([1], "4"), 4), "damaged header"),
        (header(entry([4], 16), 4), r"cut short or damaged \(\d+ bytes, \d+ by its header"),
        (header(entry([1]), 100), "cut short or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_weights_are_refused_before_they_are_believed(folder: Path, content: bytes, told: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    for read in (parameter_count, check_files, check_model, load_model, load_classifier):
        with pytest.raises(ModelError, match=told) as error:
            read(folder)
        assert f"path={folder}" in str(error.value)
        assert "model.safetensors" in str(error.value)


def test_weights_that_are_no_longer_whole(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for size in (9, 1000, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        for read in (check_files, load_model):
            with pytest.raises(ModelError, match="cut short"):
                read(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"Pickles are never loaded \(pytorch_model\.bin\)"):
        check_files(folder)


def test_headers_are_read_as_safetensors_reads_them(folder: Path) -> None:
    stored = {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    assert stored_tensors(folder) == stored
    assert parameter_count(folder) == sum(p.numel() for p in load_model(folder).parameters())


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"null", "holds null"), (b"[]", "holds an array"), (b'"x"', "holds a string"), (b"7", "holds a number"),
        (b"true", "holds a boolean"), (b"", "not valid JSON"), (b"{", "not valid JSON"), (LFS.encode(), "Git LFS"),
        (b"[" * 100_000, "RecursionError"), (b'{"model_type": "ll\xff"}', "UnicodeDecodeError"),
        (None, "cannot be read"), (b"{}", "names no model type"), (b'{"model_type": 7}', "names no model type"),
    ],
)  # fmt: skip
def test_a_config_that_is_none(folder: Path, content: bytes | None, told: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    for read in (check_files, check_model, load_model, load_classifier):
        with pytest.raises(ModelError, match=rf"config\.json .*{told}|config\.json {told}"):
            read(folder)
    if told not in ("names no model type", "cannot be read"):
        with pytest.raises(ModelError, match=rf"Tokenizer cannot be loaded .*config\.json .*{told}"):
            load_tokenizer(folder)


BLOCKS = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "left",
    [
        {"quantization_config": {"quant_method": "fp8", **BLOCKS}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "unheard-of"}},
        {"quantization_config": {}},
        {"quantization_config": "fp8"},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)  # fmt: skip
def test_a_quantization_config_is_refused_by_its_name(folder: Path, left: dict[str, Any]) -> None:
    change_json(folder / "config.json", **left)
    for read in (check_files, check_model, load_model):
        with pytest.raises(ModelError, match=r"weights are quantised \(\w+\.quant_method=.*or remove \w+_config"):
            read(folder)


def test_a_quantization_config_that_is_null_says_nothing(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config=None)
    check_model(folder)
    load_model(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "expected int, got NoneType"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "nope"}}, "KeyError: 'nope'"),
        ({"pad_token_id": 9999}, "AssertionError: Padding_idx"),
        ({"intermediate_size": -5}, "negative dimension"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
    ],
)
def test_a_config_that_makes_no_model(folder: Path, changes: dict[str, Any], told: str) -> None:
    change_json(folder / "config.json", **changes)
    for read in (check_model, load_model):
        with pytest.raises(ModelError, match=told) as error:
            read(folder)
        assert f"path={folder}" in str(error.value)


@pytest.mark.parametrize("raised", [RuntimeError, KeyError, MemoryError, RecursionError, AssertionError, StopIteration])
@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_whatever_a_library_raises(folder: Path, raised: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised(f"one\n two. Model type should be one of {', '.join(map(str, range(500)))}")

    monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    read = {"AutoConfig": models.layer_count, "AutoModelForCausalLM": load_model, "AutoTokenizer": load_tokenizer}[name]
    with pytest.raises(ModelError, match=raised.__name__) as error:
        read(folder)
    assert f"path={folder}" in str(error.value)
    assert "one of" not in str(error.value)  # lists of classes are cut
    assert "\n" not in str(error.value)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.json": None}, "there is no tokenizer in it"),
        ({"tokenizer.json": None, "tokenizer.model": "IQ== 0\nIg== 1\n"}, r"no tokenizer\.json, only tokenizer\.model"),
        ({"tokenizer.json": None, "qwen.tiktoken": "IQ== 0\n"}, r"only qwen\.tiktoken: convert it"),
        ({"tokenizer.json": None, "spiece.model": "\n\x0e\n\x05<unk>"}, r"only spiece\.model: convert it"),
        ({"tokenizer.json": LFS}, r"tokenizer\.json is a Git LFS pointer"),
        ({"tokenizer.json": "null"}, r"tokenizer\.json holds null"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not valid JSON"),
        ({"tokenizer.json": "{}"}, "KeyError"),
        ({"tokenizer.json": '{"a":' * 5000}, "RecursionError"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json holds an array"),
        ({"tokenizer_config.json": LFS}, r"tokenizer_config\.json is a Git LFS pointer"),
        ({"tokenizer_config.json": '{"tokenizer_class": 5}'}, "AttributeError"),
        ({"tokenizer_config.json": '{"eos_token": 5}'}, "TypeError: Special token eos_token"),
    ],
)
def test_a_tokenizer_that_is_none(folder: Path, files: dict[str, str | None], told: str) -> None:
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    for read in (load_tokenizer, check_model):
        with pytest.raises(ModelError, match=rf"Tokenizer cannot be loaded \(path={folder}\): .*{told}"):
            read(folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<zz>", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}),
        ("model", {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}),
        ("model", {"type": "Unheard-of"}),
    ],
)  # fmt: skip
def test_a_tokenizer_whose_library_panics(folder: Path, part: str, value: Any) -> None:
    """Some of these raise what is no Exception."""
    change_json(folder / "tokenizer.json", **{part: value})
    with pytest.raises(ModelError, match=r"Tokenizer cannot be loaded .*(Panic)?Exception"):
        load_tokenizer(folder)


@pytest.mark.parametrize("rows", [100, 257, 274])
def test_a_tokenizer_of_another_model(folder: Path, rows: int) -> None:
    """It has 275 tokens; in the model's own folder the embedding has more rows, which is well."""
    check_model(folder)
    change_json(folder / "config.json", vocab_size=rows)
    change_tensors(folder, lambda t: {n: v[:rows] if "embed" in n else v for n, v in t.items()})
    with pytest.raises(ModelError, match=rf"do not belong together .*vocab_size={rows}"):
        check_model(folder)


# --- architectures ----------------------------------------------------------------------------------------------------

REFUSED = {
    "gemma2": (transformers.Gemma2Config(**LLAMA, head_dim=16), r"soft-caps its logits \(final_logit_softcapping=30"),
    "cohere": (transformers.CohereConfig(**LLAMA), r"scales its logits \(logit_scale=0\.0625"),
    "granite": (transformers.GraniteConfig(**LLAMA, logits_scaling=8.0), r"scales its logits \(logits_scaling=8"),
    "nanochat": (transformers.NanoChatConfig(**LLAMA), r"soft-caps its logits \(final_logit_softcapping=15"),
    "bert": (transformers.BertConfig(**SIZES, intermediate_size=48), "encoder, no causal language model"),
    "roberta": (transformers.RobertaConfig(**SIZES, intermediate_size=48), "encoder, no causal language model"),
    "electra": (transformers.ElectraConfig(**SIZES, embedding_size=32), "encoder, no causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_are_refused_by_their_reason(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what their config says; and where it said nothing, by trying, before and while they are loaded."""
    config, told = REFUSED[name]
    place = saved(causal(config), base, tmp_path / name)
    for read in (check_files, check_model, load_model):
        with pytest.raises(ModelError, match=told):
            read(place)
    monkeypatch.setattr(model_files, "config_problems", lambda config, kind: [])
    check_files(place)
    with pytest.raises(ModelError, match="changes its logits after the output layer"):
        check_model(place)
    with pytest.raises(ModelError, match=r"changes its logits|depends on the tokens after it"):
        load_model(place)


def test_a_model_that_looks_ahead_is_told_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved(causal(transformers.BertConfig(**SIZES, intermediate_size=48)), base, tmp_path / "bert")
    change_tensors(place, lambda t: {n: v if "norm" in n.lower() else v * 20 for n, v in t.items()})
    monkeypatch.setattr(model_files, "config_problems", lambda config, kind: [])
    with pytest.raises(ModelError, match="its output at a token depends on the tokens after it"):
        load_model(place)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Llama4TextConfig(**LLAMA, intermediate_size_mlp=48, num_local_experts=2, head_dim=16),
        transformers.ModernBertDecoderConfig(
            **SIZES, intermediate_size=48, **dict.fromkeys(["bos_token_id", "cls_token_id", "sep_token_id"], 1),
            pad_token_id=0, eos_token_id=1,
        ),
    ],
    ids=["llama4", "modernbert-decoder"],
)  # fmt: skip
def test_what_no_config_tells_is_found_before_loading(config: Any, base: Path, tmp_path: Path) -> None:
    place = saved(causal(config), base, tmp_path / "model")
    check_files(place)
    for read in (check_model, load_model):
        with pytest.raises(ModelError, match=r"no base model with an output layer|further layers in between"):
            read(place)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(**GPT2),
        transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16),
        transformers.MptConfig(vocab_size=400, d_model=32, n_heads=2, n_layers=2),
        transformers.FalconConfig(**SIZES),
        transformers.MixtralConfig(**LLAMA, num_local_experts=4),
        transformers.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=16),
        transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8),
        transformers.GraniteConfig(**LLAMA, logits_scaling=1.0),
        transformers.Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=None),
        transformers.BartConfig(vocab_size=400, d_model=32, decoder_layers=2, decoder_attention_heads=2,
                                decoder_ffn_dim=48, is_encoder_decoder=False, is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_what_can_be_used_is_not_refused_beforehand(config: Any, base: Path, tmp_path: Path) -> None:
    place = saved(causal(config), base, tmp_path / "model")
    check_model(place)
    load_model(place)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_model_types_are_those_of_the_library(kind: Any) -> None:
    """Read from its source, since importing it takes seconds."""
    from transformers.models.auto import modeling_auto

    assert model_files._model_types(kind) == {*getattr(modeling_auto, model_files._TABLES[kind])}


def test_encoders_are_those_of_the_library() -> None:
    """Every type with a causal class of which `is_decoder` is false unless set, less those that read forward anyway."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = set()
    for name in model_files._model_types("causal") or ():
        fields = getattr(CONFIG_MAPPING[name], "__dataclass_fields__", {})
        standard = {key: getattr(fields.get(key), "default", None) for key in ("is_decoder", "is_encoder_decoder")}
        if standard["is_decoder"] is False and standard["is_encoder_decoder"] is not True:
            found.add(name)
    assert found - {"gpt_neox", "gpt_neox_japanese", "trocr"} == {*model_files._ENCODERS.split()}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "t5"}, "no causal language model of its type"),
        ({"model_type": "clip"}, "no causal language model of its type"),
        ({"model_type": "llava"}, "no causal language model of its type"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "text_config": {"final_logit_softcapping": 30.0}}, "soft-caps its logits"),
        ({"model_type": "recurrent_gemma", "logits_soft_cap": 30.0}, "soft-caps its logits"),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, "scales its logits"),
    ],
)
def test_a_config_alone_tells_an_architecture(config: dict[str, Any], told: str) -> None:
    [problem] = config_problems(config, "causal")
    assert told in problem
    assert len(problem) < 200


def test_all_problems_of_a_config_come_at_once() -> None:
    wrong = {"model_type": "t5", "quantization_config": {"quant_method": "fp8"}, "attn_implementation": "owner/kernel"}
    assert len(config_problems(wrong, "causal")) == 3


# --- commands ---------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, original: Path, **evaluation: Any) -> Path:
    given = {"type": "pretrained", "path": str(original)}
    recipe = {**SMALL, "models": {"original": given}, "storage": str(folder / "runs")}
    del recipe["finetune"]
    recipe["evaluation"] = {**SMALL["evaluation"], **evaluation}  # type: ignore[dict-item]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS)


SEEN_AT_ONCE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bert": (lambda f: change_json(f / "config.json", model_type="bert"), "encoder, no causal language model"),
    "t5": (lambda f: change_json(f / "config.json", model_type="t5"), "no causal language model of its type"),
    "capped": (lambda f: change_json(f / "config.json", final_logit_softcapping=30.0), "soft-caps its logits"),
    "fp8": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "fp8"}),
        "weights are quantised",
    ),
    "null": (lambda f: (f / "config.json").write_text("null") and None, "holds null"),
    "lfs": (lfs, "Git LFS pointer"),
}


@pytest.mark.parametrize("pipeline", [unlearn, finetune, evaluate, attack], ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", SEEN_AT_ONCE)
def test_a_plan_refuses_what_files_tell(
    name: str, pipeline: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, told = SEEN_AT_ONCE[name]
    change(folder)
    argv = [str(recipe_of(tmp_path, folder)), "--dry-run"]
    assert run_cli("d", pipeline.run, pipeline.plan, argv=argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("ModelError: ")
    assert told in error
    assert str(folder) in error


def test_plans_look_at_models_without_a_framework(base: Path, folder: Path, tmp_path: Path) -> None:
    """Those named on the command line too; and what is well passes."""
    change_json(folder / "config.json", model_type="bert")
    code = (
        "import sys; from pipelines import evaluate; from pipelines.cli import run_cli\n"
        "for words in ([], [sys.argv[2]]):\n"
        "    code = run_cli('d', evaluate.run, evaluate.plan, words='w', argv=[sys.argv[1], *words, '--dry-run'])\n"
        "    print(code, *{'torch', 'transformers', 'safetensors', 'ray'} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_of(tmp_path, base)), str(folder)], capture_output=True, text=True,
        cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line in ("0", "1")] == ["0", "1"]
    assert "encoder, no causal language model" in done.stderr


@pytest.mark.parametrize(
    ("where", "change", "told"),
    [
        ("original", {"num_hidden_layers": 6}, "missing: model.layers.2"),
        ("original", {"model_type": "bert"}, "encoder, no causal language model"),
        ("reference", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ("reference", {"model_type": "gemma2", "final_logit_softcapping": 5.0}, "soft-caps its logits"),
        ("judge", {}, "missing: score.weight"),
        ("judge", {"model_type": "t5", "quantization_config": {}}, "weights are quantised"),
    ],
)
def test_inputs_are_refused_before_data_is_prepared(
    where: str, change: Any, told: str, base: Path, folder: Path, tmp_path: Path
) -> None:
    change_json(folder / "config.json", **change)
    other = {
        "original": {},
        "reference": {"reference": {"type": "pretrained", "path": str(folder)}},
        "judge": {"judge": {"type": "classifier", "path": str(folder), "label": "x"}},
    }
    file = recipe_of(tmp_path, folder if where == "original" else base, **other[where])
    with pytest.raises(ModelError) as error:
        finetune.check_inputs(load_recipe([str(file)]))
    assert told in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("rwkv", {"num_hidden_layers": 7, "rescale_every": 2}),
        ("rwkv", {"num_hidden_layers": 7, "rescale_every": 6}),
        ("gpt2", {}),
        ("minimax", {}),
        ("gpt_oss", {}),
    ],
)
def test_a_model_that_was_loaded_is_written_as_it_was(
    family: str, changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Loading tries the model; that must not move a weight, as RWKV does when it is first asked."""
    folder = tiny_folder(family, base, tmp_path / "model", **changes)
    model = load_model(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    save_model(model, load_tokenizer(folder), tmp_path / "again")
    stored, written = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
