"""What the files of a model folder say about it, read without torch or transformers: for plans, and before loading."""

import ast
import importlib.util
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from components.errors import ModelError

Kind = Literal["causal", "classifier"]

KINDS: dict[Kind, str] = {"causal": "causal language model", "classifier": "sequence classifier"}
_TABLES: dict[Kind, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors format allows no longer header."""
_LFS = b"version https://git-lfs"

_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
"""Model types that read a text in both directions unless `is_decoder` is set."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "logits_mup_width_multiplier")
"""Settings by which families change their logits after the output layer; a scale of 1 changes nothing."""


def check_files(folder: Path, kind: Kind = "causal") -> None:
    """Raise if the folder's files show that it cannot be loaded as this kind of model.

    Raises:
        ModelError: naming everything that is wrong.
    """
    _refuse(folder, kind, [*_adapter_problems(folder), *config_problems(read_config(folder), kind)])
    stored_tensors(folder)


def check_config(folder: Path, config: Mapping[str, Any], kind: Kind) -> None:
    """Raise if a config, completed by its class's defaults, rules this kind of model out.

    Raises:
        ModelError: naming everything that is wrong.
    """
    _refuse(folder, kind, config_problems(config, kind))


def _refuse(folder: Path, kind: Kind, problems: list[str]) -> None:
    if problems:
        raise ModelError(
            f"Model cannot be used (path={folder}): {'; '.join(problems)}. Expected a {KINDS[kind]} with plain weights "
            "in safetensors."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: when it is missing or is no JSON object.
    """
    return _read_object(folder, folder / "config.json")


def json_problem(file: Path) -> str | None:
    """Why `file` holds no JSON object, in a few words; None when it does."""
    try:
        content = file.read_bytes()
        if content.startswith(_LFS):
            return f"{file.name} is a Git LFS pointer, not the file itself: run git lfs pull"
        value = json.loads(content.decode("utf-8"))
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"{file.name} is not valid JSON ({type(error).__name__}: {str(error)[:100]})"
    return None if isinstance(value, dict) else f"{file.name} holds {_json_type(value)}, not a JSON object"


def _json_type(value: Any) -> str:
    return {"NoneType": "null", "list": "an array", "str": "a string", "bool": "a boolean"}.get(
        type(value).__name__, "a number"
    )


def _read_object(folder: Path, file: Path) -> dict[str, Any]:
    if problem := json_problem(file):
        raise ModelError(
            f"Model folder cannot be read (path={folder}): {problem}. Expected the file as save_pretrained writes it."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def _adapter_problems(folder: Path) -> list[str]:
    if not (folder / "adapter_config.json").exists():
        return []
    return ["it holds an adapter (adapter_config.json): merge it into its base model, or remove the adapter's files"]


def config_problems(config: Mapping[str, Any], kind: Kind) -> list[str]:
    """Everything in a config that rules this kind of model out, in a few words each."""
    parts = [config, config["text_config"]] if isinstance(config.get("text_config"), Mapping) else [config]
    problems = []
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if (quantised := part.get(key)) is not None:
                method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
                problems.append(
                    f"config.json says that its weights are quantised ({key}.quant_method={method}): save it "
                    f"dequantised, or remove {key} where the weights are plain"
                )
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(part.get(key, "")):
                problems.append(f"config.json asks for code from the hub ({key}={part[key]}), which is never run")
    if "transformers_weights" in config:
        problems.append("config.json names a weights file of its own (transformers_weights): remove that")
    problems += _type_problems(config, kind)
    if kind == "causal" and not problems:
        problems += [problem for part in parts for problem in _logit_problems(part, config.get("model_type"))]
    return problems


def _type_problems(config: Mapping[str, Any], kind: Kind) -> list[str]:
    name = config.get("model_type")
    if not isinstance(name, str):
        return [f"config.json names no model type (model_type={name!r})"]
    known = _model_types(kind)
    if known is not None and name not in known:
        if "auto_map" in config:
            return [f"it needs code from its own folder (model_type={name}, auto_map), which is never run"]
        return [f"transformers has no {KINDS[kind]} of its type (model_type={name})"]
    if kind != "causal":
        return []
    if config.get("is_encoder_decoder"):
        return [f"it is an encoder-decoder, no causal language model (model_type={name}, is_encoder_decoder=true)"]
    if name in _ENCODERS.split() and not config.get("is_decoder"):
        return [
            f"it is an encoder, no causal language model: each token sees those after it (model_type={name}, "
            "is_decoder=false)"
        ]
    return []


def _logit_problems(config: Mapping[str, Any], name: str | None) -> list[str]:
    capped = [f"soft-caps its logits ({key}={config[key]})" for key in _CAPS if config.get(key) is not None]
    scaled = [
        f"scales its logits ({key}={config[key]})"
        for key in _SCALES
        if config.get(key) not in (None, 1) and name != "mpt"  # MPT's code leaves it aside
    ]
    return [f"it {change}, which is not supported" for change in (*capped, *scaled)]


def _model_types(kind: Kind) -> frozenset[str] | None:
    """Types of this kind that the installed transformers has a class for; None where they cannot be looked up.

    The table is read from transformers' source: importing it takes seconds and loads torch.
    """
    library = importlib.util.find_spec("transformers")
    try:
        assert library is not None
        assert library.origin is not None
        source = (Path(library.origin).parent / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
        [table] = (
            node.value
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == [_TABLES[kind]]
        )
        return frozenset(name for name, _ in ast.literal_eval(table.args[0]))  # type: ignore[attr-defined]
    except (AssertionError, AttributeError, IndexError, OSError, SyntaxError, TypeError, ValueError):
        return None  # another layout than that of today's: loading will tell


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights: one, or those that the index names.

    Raises:
        ModelError: when there are none, or one that the index names is missing.
    """
    if (folder / _ONE_FILE).is_file():
        return [folder / _ONE_FILE]
    if not (folder / _INDEX).exists():
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
        instead = f" Pickles are never loaded ({some(pickles)}): save the model in safetensors." if pickles else ""
        raise ModelError(
            f"Model folder holds no weights (path={folder}). Expected {_ONE_FILE}, or {_INDEX} with the files that it "
            f"names, as save_pretrained writes them.{instead}"
        )
    listed = _read_object(folder, folder / _INDEX).get("weight_map")
    told = listed.values() if isinstance(listed, dict) else []
    names = sorted({name for name in told if isinstance(name, str) and Path(name).name == name})
    if not names or not {*map(str, told)} <= {*names}:
        raise ModelError(
            f"Model folder cannot be read (path={folder}): {_INDEX} has no weight_map from names of tensors to files "
            "beside it. Expected the file as save_pretrained writes it."
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"Model folder is incomplete (path={folder}, missing={some(missing)}). Expected all {len(names)} files "
            f"that {_INDEX} names. Copy or download it again."
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in the folder's weight files, from their headers.

    Raises:
        ModelError: when a file is missing or damaged.
    """
    problems: list[str] = []
    tensors: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            tensors |= _read_header(file)
        except OSError as error:
            problems.append(f"{file.name} cannot be read ({error.strerror})")
        except ValueError as error:
            problems.append(f"{file.name} {error}")
    if problems:
        raise ModelError(
            f"Weights cannot be read (path={folder}): {'; '.join(problems)}. Expected whole safetensors files. Copy or "
            "download them again."
        )
    return tensors


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file.

    The length of the header stands in the file: it is not believed before it is compared with the file's own.

    Raises:
        ValueError: saying what is wrong with the file, after its name.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS))
        if start == _LFS:
            raise ValueError("is a Git LFS pointer, not the file itself: run git lfs pull")
        if size < 8:
            raise ValueError(f"is cut short or empty ({size} bytes)")
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"is no safetensors file or cut short (header of {length:,} bytes, file of {size:,})")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            tensors = {name: _shape(about["shape"]) for name, about in header.items()}
            end = max((_shape(about["data_offsets"])[1] for about in header.values()), default=0)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"has a damaged header ({type(error).__name__})") from error
    if 8 + length + end != size:
        raise ValueError(f"is cut short or damaged ({size:,} bytes, {8 + length + end:,} by its header)")
    return tensors


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(size) is not int or size < 0 for size in value):
        raise TypeError(value)
    return tuple(value)


def parameter_count(folder: Path) -> int:
    """Parameters stored in a folder's safetensors files, read from their headers without loading a tensor.

    Raises:
        ModelError: when a file is missing or damaged.
    """
    return sum(math.prod(shape) for shape in stored_tensors(folder).values())


def some(names: list[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
