"""Models and tokenizers as folders: made from a config, found, fingerprinted, loaded and written."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import Pretrained, Scratch, digest
from components.data.prompts import TokenizerFacts
from components.errors import ModelError
from components.files import sha256, whole_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # never pickles


def local_folder(model: Pretrained, storage: Path) -> Path:
    """The model's folder, fetched from the hub into `storage` (where all nodes see it) when `model.path` is none.

    Raises:
        ModelError: when it is neither a folder with a model nor a hub id within reach.
    """
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise ModelError(
                f"Model folder is incomplete (path={path}). Expected config.json and *.safetensors, as "
                "save_pretrained writes them."
            )
        return path.resolve()
    if not _is_hub_id(model.path):
        raise ModelError(f"Model folder does not exist (path={path}). Expected a folder with config.json and weights.")
    return _from_hub(model, storage, _WEIGHT_FILES)


def tokenizer_folder(model: Pretrained, storage: Path) -> Path:
    """Like `local_folder`, for who needs no weights: they may be missing, and are not fetched."""
    path = Path(model.path).expanduser()
    if (path / "tokenizer.json").is_file():
        return path.resolve()
    if path.is_dir() or not _is_hub_id(model.path):
        return local_folder(model, storage)
    return _from_hub(model, storage / "tokenizers", ["*.json", "*.jinja"])


def _is_hub_id(path: str) -> bool:
    return not path.startswith(("/", ".", "~")) and path.count("/") <= 1


def _from_hub(model: Pretrained, storage: Path, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        name = f"{model.path.replace('/', '--')}@{model.revision or 'main'}"
        folder = storage / "hub" / name
        begun = folder.with_name(f"{name}.begun")  # there while files are missing
        if begun.exists():  # out of reach of the hub, the half that was downloaded would be taken for all
            HfApi().model_info(model.path, revision=model.revision, timeout=10)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
        snapshot_download(model.path, revision=model.revision, allow_patterns=patterns, local_dir=folder)
        begun.unlink(missing_ok=True)
        return folder
    except Exception as error:  # the hub client raises many unrelated kinds
        raise ModelError(
            f"Model cannot be had from the hub (path={model.path}, revision={model.revision}): "
            f"{type(error).__name__}. Expected a local folder, or a hub id and a network that reaches the hub. "
            "Download the model elsewhere and give its folder."
        ) from error


def fingerprint(folder: Path) -> str:
    """32 hex digits over the weights, config and tokenizer files of a model folder."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model") and file.is_file():
            total.update(f"{file.name}:{sha256(file)}".encode())
    return total.hexdigest()[:32]


def parameter_count(folder: Path) -> int:
    """Parameters stored in a folder's safetensors files, read from their headers without loading a tensor."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for dimension in tensor["shape"]:
                    size *= dimension
                count += size
    return count


def scratch_parameter_count(scratch: Scratch) -> int:
    """Parameters of the Llama that `make_scratch` builds (tied embeddings, SwiGLU)."""
    width, inner = scratch.hidden_size, _inner_size(scratch)
    layer = 4 * width * width + 3 * width * inner + 2 * width
    return scratch.vocabulary * width + scratch.layers * layer + width


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The folder's fast tokenizer.

    Raises:
        ModelError: when there is none, or when it has no EOS token to end answers with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Tokenizer cannot be loaded (path={folder}): {error}. Expected tokenizer.json in the model's folder."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"Tokenizer is not a fast one (path={folder}). Expected tokenizer.json; convert it first.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"Tokenizer has no EOS token (path={folder}). Expected one, since every answer ends with it. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> TokenizerFacts:
    """What preparing rows needs of a tokenizer."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["truncation"] = spec["padding"] = None  # left in the file by whoever used it last: rows would be cut silently
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    chat = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return TokenizerFacts(json.dumps(spec, sort_keys=True), int(tokenizer.eos_token_id), chat, named)


def context_length(folder: Path) -> int | None:
    """Longest input that the model's config allows, in tokens; None when it names no limit."""
    if not (folder / "config.json").exists():
        return None
    config = json.loads((folder / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("n_positions")


def hidden_size(folder: Path, last: bool) -> int:
    """Width of a decoder layer's output, or of the `last` hidden states that the output layer takes."""
    config = _text_config(folder)
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size) if last else config.hidden_size)


def layer_count(folder: Path) -> int:
    """Decoder layers that the config names."""
    return int(_text_config(folder).num_hidden_layers)


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()


def load_model(folder: Path, dtype: str = "fp32") -> Any:
    """The model in evaluation mode.

    Raises:
        ModelError: when it cannot be loaded from safetensors, or when its logits are not `head(base(x))`, which the
            training step and the cached reference rely on (such as logits that are soft-capped or scaled).
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"Model cannot be loaded (path={folder}): {str(error)[:300]}. Expected a causal language model in "
            "safetensors, of a kind that transformers knows: code from the model's own folder is never run."
        ) from error
    model.eval()
    with torch.no_grad():
        probe = torch.tensor([[0, 1, 2, 3]])
        whole = model(input_ids=probe, use_cache=False).logits
        parts = model.get_output_embeddings()(model.base_model(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.isfinite(whole).all():
        raise ModelError(f"Model gives numbers that are not finite (path={folder}). Expected sound weights.")
    if not torch.equal(whole, parts):
        raise ModelError(
            f"Model changes its logits after the output layer (path={folder}, class={type(model).__name__}). "
            "Expected logits that are the output layer's; soft-capped or scaled ones are not supported."
        )
    return model


def load_classifier(folder: Path) -> tuple[Any, Any]:
    """(sequence classifier in evaluation mode, its tokenizer).

    Raises:
        ModelError: when it cannot be loaded from safetensors.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer knows neither a token to pad with nor an EOS")
        model.config.pad_token_id = tokenizer.pad_token_id
        return model.eval(), tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"Classifier cannot be loaded (path={folder}): {str(error)[:300]}. Expected a sequence classifier in "
            "safetensors with its tokenizer."
        ) from error


def check_packing(model: Any, folder: Path) -> None:
    """Refuse a model whose sequences see each other when they share a row.

    Raises:
        ModelError: naming the model.
    """
    import torch

    device = next(model.parameters()).device
    first, second = torch.tensor([5, 6, 7, 8], device=device), torch.tensor([9, 5, 6], device=device)
    with torch.no_grad():
        alone = model.base_model(input_ids=second[None], use_cache=False).last_hidden_state[0]
        packed = model.base_model(
            input_ids=torch.cat([first, second])[None],
            position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device),
            use_cache=False,
        ).last_hidden_state[0, 4:]
    if (alone - packed).norm() > 1e-3 * alone.norm():
        raise ModelError(
            f"Model mixes sequences that share a row (path={folder}, class={type(model).__name__}). Expected it to "
            "keep them apart by their position ids. Set train.packing=false."
        )


def inference_device() -> "torch.device":
    """The GPU that this process may use, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_scratch(scratch: Scratch, texts: Iterable[str], seed: int, storage: Path) -> Path:
    """A folder with a random small Llama and a byte-level BPE tokenizer trained on `texts`; found again by its hash."""
    texts = list(texts)
    folder = storage / "models" / f"base-{digest([scratch.model_dump(), digest(texts, 64), seed])}"
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=scratch.vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>", model_max_length=scratch.context
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=scratch.vocabulary,
            hidden_size=scratch.hidden_size,
            intermediate_size=_inner_size(scratch),
            num_hidden_layers=scratch.layers,
            num_attention_heads=scratch.heads,
            num_key_value_heads=scratch.heads,
            max_position_embeddings=scratch.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with whole_folder(folder) as partial:
        save_model(model, tokenizer, partial)
    return folder


def save_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    state: "dict[str, torch.Tensor] | None" = None,
) -> None:
    """Write a plain Hugging Face folder; `state` takes the place of the model's own (possibly sharded) tensors."""
    with without_warnings():
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    tokenizer.save_pretrained(folder)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Inside, nobody logs a warning: on its first import DeepSpeed, which saving a model may be, warns of no GPU."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _inner_size(scratch: Scratch) -> int:
    return 8 * ((8 * scratch.hidden_size // 3 + 7) // 8)


def quiet_libraries() -> None:
    """Keep progress bars, advice and deprecations inside other libraries out of the console."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")  # Ray Data, of a small set


def answer_text(tokenizer: Any, ids: list[int]) -> str:
    """Generated ids up to EOS as text."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
