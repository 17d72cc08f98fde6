"""Models and tokenizers as folders: made from a config, found, fingerprinted, loaded and written."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import Pretrained, Scratch, digest
from components.data.prompts import TokenizerFacts
from components.errors import ModelError, UnlearnError
from components.files import sha256, whole_folder
from components.model_files import (
    KINDS,
    Kind,
    check_config,
    check_files,
    json_problem,
    read_config,
    some,
    stored_tensors,
    weight_files,
)

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
        read_config(path)
        weight_files(path)
        return path.resolve()
    if not _is_hub_id(model.path):
        raise ModelError(f"Model folder does not exist (path={path}). Expected a folder with config.json and weights.")
    return _from_hub(model, storage, _WEIGHT_FILES)


def tokenizer_folder(model: Pretrained, storage: Path) -> Path:
    """Like `local_folder`, for who needs no weights: they may be missing, and are not fetched."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path.resolve()
    if not _is_hub_id(model.path):
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
    tokenizer = _open_tokenizer(folder)
    if not tokenizer.is_fast:
        raise ModelError(f"Tokenizer is not a fast one (path={folder}). Expected tokenizer.json; convert it first.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"Tokenizer has no EOS token (path={folder}). Expected one, since every answer ends with it. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def _open_tokenizer(folder: Path) -> Any:
    expected = "Expected tokenizer.json, as save_pretrained of a fast tokenizer writes it."
    try:
        tokenizer = _from_folder("AutoTokenizer", folder, "Tokenizer", expected)
        with _told("Tokenizer", folder, expected):
            tokenizer("")  # what it adds to each text
        return tokenizer
    except ModelError as error:
        problem = None if _NEEDS_CODE in str(error) else _tokenizer_problem(folder)
        if problem is None:
            raise
        raise ModelError(f"Tokenizer cannot be loaded (path={folder}): {problem}. {expected}") from error


def _tokenizer_problem(folder: Path) -> str | None:
    """What the folder's files tell of a tokenizer that the library could not load; None when they look well."""
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists() and (problem := json_problem(folder / name)):
            return problem
    if (folder / "tokenizer.json").exists():
        return None
    other = {*folder.glob("*.tiktoken"), *folder.glob("*.model"), *folder.glob("vocab.*"), *folder.glob("tekken.json")}
    if not other:
        return "there is no tokenizer in it"
    return f"there is no tokenizer.json, only {some(sorted(file.name for file in other))}: convert it first"


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> TokenizerFacts:
    """What preparing rows needs of a tokenizer."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["truncation"] = spec["padding"] = None  # left in the file by whoever used it last: rows would be cut silently
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    chat = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return TokenizerFacts(json.dumps(spec, sort_keys=True), int(tokenizer.eos_token_id), chat, named)


def context_length(folder: Path) -> int | None:
    """Longest input that the model's config allows, in tokens; None when it names no limit.

    Most names are aliases of max_position_embeddings in transformers' config classes. Recurrent models (Mamba) and
    BLOOM, whose ALiBi is made for any length, name none: BLOOM's `seq_length` is what it was trained on.
    """
    if not (folder / "config.json").exists():
        return None
    config = _text_config(folder)
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT has the second
    return next((length for length in named if isinstance(length, int) and length > 0), None)


def hidden_size(folder: Path, last: bool) -> int:
    """Width of a decoder layer's output, or of the `last` hidden states that the output layer takes."""
    config = _text_config(folder)
    with _told("Model", folder, "Expected a config with hidden_size."):
        return int(getattr(config, "word_embed_proj_dim", config.hidden_size) if last else config.hidden_size)


def layer_count(folder: Path) -> int:
    """Decoder layers that the config names."""
    config = _text_config(folder)
    with _told("Model", folder, "Expected a config with num_hidden_layers."):
        return int(config.num_hidden_layers)


def _text_config(folder: Path) -> Any:
    return _from_folder("AutoConfig", folder, "Model", _EXPECTED).get_text_config()


_EXPECTED = "Expected a folder as save_pretrained writes it, of a model type that transformers knows."
_AUTO: dict[Kind, str] = {"causal": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification"}


def check_model(folder: Path, kind: Kind = "causal") -> None:
    """Raise if the model or its tokenizer cannot be used, as far as can be known without reading a weight.

    The model is made without memory for its weights (on torch's meta device) and compared with the names and shapes
    of the stored tensors.

    Raises:
        ModelError: naming what is wrong with its files, config, tensors or tokenizer.
    """
    import torch

    check_files(folder, kind)
    config = _from_folder("AutoConfig", folder, "Model", _EXPECTED)
    check_config(folder, config.to_dict(), kind)
    tokenizer = load_tokenizer(folder) if kind == "causal" else _classifier_tokenizer(folder)
    stored = {name: torch.empty(shape, device="meta") for name, shape in stored_tensors(folder).items()}
    try:
        model = _open_whole(
            folder, kind, config=config, dtype=torch.float32, state_dict=stored, device_map={"": "meta"}
        )
        if kind == "causal":
            _check_output_layer(model, folder)
    except ModelError as error:
        if not isinstance(error.__cause__, NotImplementedError):  # torch's, where numbers are needed: loading will tell
            raise
    _check_vocabulary(folder, config, tokenizer)


def _check_vocabulary(folder: Path, config: Any, tokenizer: Any) -> None:
    """Raise if the tokenizer gives ids that the model has no embedding for."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not tokenizer.is_fast or not isinstance(rows, int):
        return
    plain = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    highest = max([*plain, tokenizer.eos_token_id or 0])
    if highest >= rows:
        raise ModelError(
            f"Tokenizer and model do not belong together (path={folder}, highest token id={highest}, "
            f"vocab_size={rows}). Expected an embedding for each token. Put the model's own tokenizer into the folder."
        )


def load_model(folder: Path, dtype: str = "fp32") -> Any:
    """The model in evaluation mode; `dtype` is fp32, bf16, or auto for that of the folder.

    Raises:
        ModelError: when it cannot be loaded from safetensors, when tensors are missing, superfluous or of another
            shape, or when its logits are not `head(base(x))`, which the training step and the cached reference rely
            on (such as logits that are soft-capped or scaled).
    """
    import torch

    check_files(folder)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": "auto"}
    model = _open_whole(folder, "causal", dtype=types[dtype]).eval()
    if getattr(model.config, "rescale_every", 0):  # RWKV divides weights in place before its first answer
        model.config.rescale_every = 0
    with _told("Model", folder, f"Expected a {KINDS['causal']} that takes token ids alone."):
        _check_logits(model, folder)
    return model


def _check_logits(model: Any, folder: Path) -> None:
    """Try the model on four tokens: causal, finite, and with logits that are the output layer's."""
    import torch

    head = _output_layer(model, folder)
    probe, other = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 1]])  # apart: not every model bears a batch
    versions = [parameter._version for parameter in model.parameters()]
    with torch.no_grad():
        whole, changed = (model(input_ids=ids, use_cache=False).logits for ids in (probe, other))
        parts = head(model.base_model(input_ids=probe, use_cache=False).last_hidden_state)
    if versions != [parameter._version for parameter in model.parameters()]:
        raise ModelError(
            f"Model changes its own weights when it is asked (path={folder}, class={type(model).__name__}). Expected "
            "one that leaves them alone: what is exported would be something else."
        )
    if not torch.isfinite(whole).all():
        raise ModelError(f"Model gives numbers that are not finite (path={folder}). Expected sound weights.")
    if (whole[0, :3] - changed[0, :3]).norm() > 1e-2 * whole[0, :3].norm():
        raise ModelError(
            f"Model is no {KINDS['causal']} (path={folder}, class={type(model).__name__}): its output at a token "
            "depends on the tokens after it. Expected one that reads from left to right."
        )
    if not torch.equal(whole, parts):
        raise _changed_logits(model, folder)


def _output_layer(model: Any, folder: Path) -> Any:
    head = model.get_output_embeddings()
    if model.base_model is model or head is None:
        raise ModelError(
            f"Model has no base model with an output layer on it (path={folder}, class={type(model).__name__}). "
            f"Expected a {KINDS['causal']} whose base model gives the last hidden states."
        )
    return head


def _changed_logits(model: Any, folder: Path) -> ModelError:
    return ModelError(
        f"Model changes its logits after the output layer, or the hidden states before it (path={folder}, "
        f"class={type(model).__name__}). Expected logits that are the output layer's; soft-capped or scaled ones, and "
        "further layers in between, are not supported."
    )


def _check_output_layer(model: Any, folder: Path) -> None:
    """What `_check_logits` tells of the output layer, for a model without numbers (on torch's meta device).

    Its base model and output layer are replaced by small ones with numbers; all that lies between and behind is run.
    """
    import torch

    width = _output_layer(model, folder).weight.shape[1]
    states, small = torch.randn(1, 4, width), torch.nn.Linear(width, 8, bias=False)
    asked = []

    def give(*arguments: Any, **options: Any) -> _Given:
        asked.append(True)
        return _Given(states)

    model.base_model.forward = give
    model.set_output_embeddings(small)
    try:
        with torch.no_grad():
            same = torch.equal(model(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False).logits, small(states))
    except Exception as error:
        if asked and isinstance(error, RuntimeError) and "meta" in str(error):  # a layer behind the base took part
            raise _changed_logits(model, folder) from error
        return  # it uses its base model in another way: loading will tell
    if not same:
        raise _changed_logits(model, folder)


class _Given:
    """Stands for the output of a base model that gives last hidden states and nothing else."""

    def __init__(self, states: "torch.Tensor"):
        self.last_hidden_state = states

    def __getitem__(self, place: Any) -> Any:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def load_classifier(folder: Path) -> tuple[Any, Any]:
    """(sequence classifier in evaluation mode, its tokenizer).

    Raises:
        ModelError: when it cannot be loaded from safetensors, or when tensors are missing, superfluous or of another
            shape.
    """
    check_files(folder, "classifier")
    model, tokenizer = _open_whole(folder, "classifier"), _classifier_tokenizer(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _classifier_tokenizer(folder: Path) -> Any:
    tokenizer = _open_tokenizer(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"Tokenizer of the classifier has neither a token to pad with nor an EOS (path={folder}). Expected one. "
            "Set pad_token in tokenizer_config.json."
        )
    return tokenizer


def _open_whole(folder: Path, kind: Kind, **options: Any) -> Any:
    """The model with exactly its stored tensors.

    Raises:
        ModelError: naming tensors that are missing, superfluous or of another shape.
    """
    model, found = _from_folder(
        _AUTO[kind],
        folder,
        KINDS[kind].capitalize(),
        _EXPECTED,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    shapes = stored_tensors(folder)
    check_tensors(
        folder,
        KINDS[kind],
        missing=found["missing_keys"],
        superfluous=[name for name in found["unexpected_keys"] if not _without_effect(name, shapes.get(name), kind)],
        reshaped=[f"{name} {tuple(one)}, not {tuple(other)}" for name, one, other in found["mismatched_keys"]],
        cure="Correct config.json, or save the whole model again.",
    )
    return model


def _without_effect(name: str, shape: tuple[int, ...] | None, kind: Kind) -> bool:
    """Whether a stored tensor may be left out, beside those that its class declares.

    Folders written long ago hold causal masks and the numbers masked with; those of many classifiers the pooling layer
    of the encoder that they were made from, which their class leaves out.
    """
    if _MASKS.search(name):
        return shape == () or (shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])
    return kind == "classifier" and _POOLER.search(name) is not None


_MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$")
_POOLER = re.compile(r"(^|\.)pooler\.")


def check_tensors(
    place: Path,
    what: str,
    *,
    missing: Collection[str],
    superfluous: Collection[str],
    cure: str,
    reshaped: Collection[str] = (),
) -> None:
    """Raise if stored tensors are not exactly those of `what`.

    Libraries draw missing weights at random and drop superfluous ones, with a warning at most. Tensors that a class of
    transformers declares to be without effect, such as old buffers, are neither.

    Raises:
        ModelError: naming the tensors.
    """
    named = {"missing": missing, "superfluous": superfluous, "of another shape": reshaped}
    problems = [f"{how}: {some(sorted(names))}" for how, names in named.items() if names]
    if problems:
        raise ModelError(
            f"Tensors are not those of the {what} (path={place}): {'; '.join(problems)}. Expected exactly its own: "
            f"nothing is made up or left out. {cure}"
        )


def _from_folder(auto: str, folder: Path, what: str, expected: str, **options: Any) -> Any:
    """The one door to transformers' `from_pretrained`: nothing is downloaded, and no code of the folder is run.

    `auto` names one of transformers' Auto classes. With `state_dict`, its tensors are taken in place of the folder's,
    for the model of `config`. Without `trust_remote_code=False`, transformers asks on the terminal whether to run the
    folder's code, and runs it when the answer is y.

    Raises:
        ModelError: in place of whatever the library raises.
    """
    with _told(what, folder, expected):
        import torch
        import transformers

        quiet_libraries()  # no bars of their own, nor reports on what becomes an error here
        door = getattr(transformers, auto)
        if "state_dict" not in options:
            return door.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        with torch.device("meta"):  # the class and its config, which Auto classes choose; no memory
            model = door.from_config(options["config"], dtype=options["dtype"], trust_remote_code=False)
        options["config"] = model.config
        return type(model).from_pretrained(None, local_files_only=True, trust_remote_code=False, **options)


@contextmanager
def _told(what: str, folder: Path, expected: str) -> Iterator[None]:
    """Turn whatever a library raises on a foreign folder into an error that names the folder and the cause.

    Raises:
        ModelError: in place of any error but our own.
    """
    try:
        yield
    except UnlearnError:
        raise
    except BaseException as error:
        # Libraries in Rust panic with something that is no Exception and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what} cannot be loaded (path={folder}): {_cause(error)}. {expected}") from error


_NEEDS_CODE = "it needs code from its own folder, which is never run"


def _cause(error: BaseException) -> str:
    """What a library says, on one line: without lists of all its classes, nor the advice to run the folder's code."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return _NEEDS_CODE
    text = text.partition("Model type should be one of")[0]
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return f"{type(error).__name__}: {text}".rstrip(" .:")


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
