"""What of a model is trained, and how the whole model is put together again afterwards."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.config import Influence, Lora, Soul
from components.errors import ConfigError
from components.files import whole_folder
from components.layers import check_layer, cut_after, parameters_above
from components.matrices import block_matrices
from components.models import check_tensors, load_model, load_tokenizer, save_model
from components.training.engine import AnswerModel
from components.training.job import Job


def answer_model(model: Any, job: Job) -> AnswerModel:
    """The job's model with its adapters or frozen parameters, ending where no term needs what comes after.

    Raises:
        ConfigError, ModelError: when nothing would be trained, or a term asks for a layer that is not there.
    """
    layer = job.objective.layer
    ends = False
    if layer is not None:
        check_layer(model, layer)
        if all(getattr(term, "layer", None) is not None for term in job.objective.terms().values()):
            for p in parameters_above(model, layer):  # no gradient comes there; weight decay must not either
                p.requires_grad_(False)
            ends = not job.train.probe and not _needs_logits(job) and cut_after(model, layer)
    if job.train.lora:
        add_adapters(model, job.train.lora, job.seed)
    if job.train.trainable:
        _freeze_others(model, job.train.trainable)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "No parameter would be trained. Expected some below the layer of the objective's terms, and in "
            "train.trainable or train.lora.targets."
        )
    return AnswerModel(model, layer, ends)


def add_adapters(model: Any, lora: Lora, seed: int) -> None:
    """Put low-rank adapters into `model` and freeze all else. They start as nothing: B is 0.

    Raises:
        ConfigError: when no layer has a name among the targets, or when the model does not run with the adapters.
    """
    import peft

    head = model.get_output_embeddings()
    plain = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_plain(m) and m is not head}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)  # the same on all ranks
        try:
            peft.inject_adapter_in_model(_adapter_config(lora, model), model)
            model.base_model(input_ids=torch.tensor([[0, 1, 2, 3]], device=model.device), use_cache=False)
        except (ValueError, AttributeError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"Adapters cannot be put into the model (train.lora.targets={lora.targets}, "
                f"class={type(model).__name__}): {error}. Expected names of layers that adapters can be put into. "
                f"Set train.lora.targets to some of {', '.join(sorted(plain))}."
            ) from error


def save_result(job: Job, model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write the trained model as a plain Hugging Face folder.

    `state` holds the trained weights by name, as the engine's module `model` has them. What was cut off is the
    original's, adapters are merged (and with `export_adapter` also written to `<job.output>-adapter`), and task-vector
    negation is done.
    """
    tokenizer = load_tokenizer(Path(job.model))
    if job.train.lora:
        model = _merged(job, state)
        state = model.state_dict()
    if job.objective.layer is not None or job.objective.negate:
        model = load_model(Path(job.model), job.train.dtype)
        state = {**model.state_dict(), **state}
    if job.objective.negate:
        state = negated(model.state_dict(), state, job.objective.negate)
    save_model(model, tokenizer, folder, state)


def negated(original: dict[str, Tensor], trained: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """θ_o − α·(θ − θ_o): away from what training learnt (task-vector negation, 2212.04089)."""
    return {
        name: (first.float() - scale * (trained[name].float() - first.float())).to(first.dtype)
        for name, first in original.items()
    }


def _needs_logits(job: Job) -> bool:
    """Whether something beside the objective takes logits: labels drawn for curvature, or the mask's retain loss."""
    kind = job.optimizer
    return bool(job.mask) or isinstance(kind, Influence) or (isinstance(kind, Soul) and kind.curvature == "gnb")


def _freeze_others(model: nn.Module, patterns: str | list[str]) -> None:
    expressions = [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    names = [name for name, _ in model.named_parameters()]
    if not any(expression.search(name) for expression in expressions for name in names):
        raise ConfigError(
            f"No parameter has such a name (train.trainable={patterns}). Expected a regular expression that is found "
            f"in names such as {', '.join(names[:: max(1, len(names) // 4)])}."
        )
    for name, p in model.named_parameters():
        if not any(expression.search(name) for expression in expressions):
            p.requires_grad_(False)


def _adapter_config(lora: Lora, model: Any) -> Any:
    """peft's settings. "all-linear" is every matrix of the blocks, which peft itself looks for by class.

    It would leave out experts in one tensor, and routers, whose modules it cannot wrap. Where a model has any such, all
    of its matrices are named as parameters: peft renames modules of mixtures by the names of older releases.
    """
    import peft

    targets: dict[str, Any] = {"target_modules": lora.targets}
    if lora.targets == "all-linear":
        names = list(block_matrices(model))
        plain = all(_is_plain(model.get_submodule(name.rpartition(".")[0])) for name in names)
        targets = {"target_modules": [name.rpartition(".")[0] for name in names]}
        if not plain:
            targets = {"target_modules": [], "target_parameters": names}
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, task_type=peft.TaskType.CAUSAL_LM, **targets)


def _is_plain(module: nn.Module) -> bool:
    """Whether peft can put an adapter beside the module: it cannot where a subclass gives more than the product."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def _merged(job: Job, state: dict[str, Tensor]) -> Any:
    """The original with the trained adapters in its weights."""
    import peft

    assert job.train.lora is not None
    model = load_model(Path(job.model), job.train.dtype)
    adapted = peft.get_peft_model(model, _adapter_config(job.train.lora, model))
    own = adapted.base_model.model.state_dict()
    wanted, trained = ({name for name in tensors if "lora_" in name} for tensors in (own, state))
    check_tensors(
        Path(job.output),
        "model's adapters",
        missing=wanted - trained,
        superfluous=trained - wanted,
        cure="Train the model again.",
    )
    adapters = {name: state[name].to(own[name].dtype) for name in trained}
    adapted.base_model.model.load_state_dict(adapters, strict=False)  # the rest is the original's
    if job.train.lora.export_adapter:
        with whole_folder(Path(f"{job.output}-adapter")) as folder:
            adapted.save_pretrained(folder)
    return adapted.merge_and_unload()
