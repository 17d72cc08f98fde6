"""The DeepSpeed engine: set up, step, look at gradients and export, with the traps of DeepSpeed 0.19 kept shut."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.config import Train
from components.errors import BadNumbers
from components.layers import Watch
from components.models import without_warnings
from components.process import environment


class Outputs(NamedTuple):
    """What the model says at the n positions that predict an answer token."""

    logits: Tensor | None
    """[n, vocabulary]; None where the model ends at a layer below."""
    states: Tensor | None
    """[n, hidden size] output of the watched layer; None where none is."""

    def nothing(self) -> Tensor:
        """0 that depends on all outputs: with it even an empty micro-batch takes part in every collective."""
        return torch.stack([output.sum() * 0 for output in self if output is not None]).sum()


class AnswerModel(nn.Module):
    """A causal language model that computes logits only where an answer token is predicted.

    `layer` is a decoder layer to watch; with `ends` the base model ends there and there are no logits.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None, ends: bool = False):
        super().__init__()
        self.model = model
        self.ends = ends
        self._watch = Watch(model, layer) if layer is not None and not ends else None

    def forward(self, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None) -> Outputs:
        """[rows, length] ids and [n] flat positions → outputs there.

        No attention mask: rows are right-padded and attention is causal. Where `position_ids` begin anew within a row,
        transformers keeps the sequences apart, but only without an attention mask and without a cache.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, use_cache=False, **({} if position_ids is None else {"position_ids": position_ids})
        ).last_hidden_state
        at = hidden.flatten(0, 1)[positions]
        if self.ends:
            return Outputs(None, at)
        states = self._watch.take().flatten(0, 1)[positions] if self._watch else None
        return Outputs(self.model.get_output_embeddings()(at), states)


def deepspeed_config(train: Train) -> dict[str, Any]:
    """DeepSpeed's settings, those that matter said explicitly."""
    zero: dict[str, Any] = {"stage": train.zero_stage, "reduce_bucket_size": 5_000_000}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop sets the boundaries: a step may have any number of micro-batches
        "gradient_clipping": train.gradient_clipping,  # explicit: the default is 1.0 in this version, 0 in older ones
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # bf16 by default, to which ZeRO-1 would round the fp32 sum of a step's micro-batches
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def start_engine(model: AnswerModel, optimizer: torch.optim.Optimizer, train: Train) -> Any:
    """A DeepSpeed engine around `model`; torch.distributed must be up already."""
    deepspeed = _import_deepspeed()
    # Used by DeepSpeed's inference only; building it would need a compiler and leaks shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(train), dist_init_required=False
    )
    engine.module.eval()  # no dropout: the KL to the original is 0 at the start, and a step does not depend on the rank
    if hasattr(optimizer, "init_state"):  # before the first step: ZeRO-1 and 2 link their views of the state only once
        for p in optimizer_parameters(engine):
            optimizer.init_state(p)
    return engine


def optimizer_parameters(engine: Any) -> list[nn.Parameter]:
    """What the optimizer sees on this rank: ZeRO's flat fp32 pieces, or at stage 0 the parameters themselves."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hands them over one by one
    return flat or [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def _import_deepspeed() -> Any:
    # It has torch compile an optimizer that is not used here, for which a second and more of imports is needed
    with without_warnings(), environment(TORCHDYNAMO_DISABLE="1"):
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # of ZeRO-1 in bf16: it prints
    return deepspeed


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Accumulate gradients; `last` marks the step's last micro-batch."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def optimizer_step(engine: Any, what: str = "the objective") -> float:
    """Clip, update, forget the gradients of `what`. Returns the global gradient norm before clipping.

    Raises:
        BadNumbers: on all ranks alike, and without an update, when the norm is not finite.
    """
    norm = _unsharded_norm(engine)
    if norm is None or _is_good(norm):
        engine.step()  # with ZeRO it skips the update itself when the norm is not finite
    else:
        engine.zero_grad()
    _clear_stale_gradients(engine.optimizer)
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    _check_norm(norm, what)
    return norm


def _unsharded_norm(engine: Any) -> float | None:
    """Gradient norm at stage 0 in fp32, where DeepSpeed keeps none and would update whatever it is; else None."""
    if engine.optimizer is not engine.basic_optimizer:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def _is_good(norm: float) -> bool:
    return math.isfinite(norm) and norm >= 0  # ZeRO says -1 for an overflow


def _check_norm(norm: float, what: str) -> None:
    if not _is_good(norm):
        raise BadNumbers(
            f"Gradient of {what} is not finite (norm={norm}). Expected a finite one; no parameter was changed by it. "
            "Lower optimizer.lr or objective.forget.weight, or set train.gradient_clipping."
        )


@contextmanager
def visit_gradients(engine: Any, visit: Callable[[nn.Parameter], None], what: str) -> Iterator[None]:
    """Inside, run `backward` of `what`; on leaving, `visit(p)` sees each of `optimizer_parameters` that got a gradient.

    `p.grad` is the gradient over all ranks, not clipped. Nothing is updated or counted: this goes through ZeRO's
    wrapper with the optimizer's step taken away, and not through `engine.step()`. Must not run between the
    micro-batches of a training step.

    Raises:
        BadNumbers: on all ranks alike when the gradient is not finite; nothing is visited then.
    """
    yield
    norm = _visit(engine, visit)
    _check_norm(norm, what)


def discard_gradients(engine: Any) -> None:
    """Forget what `backward` left, on all ranks alike."""
    _visit(engine, lambda p: None)


def _visit(engine: Any, visit: Callable[[nn.Parameter], None]) -> float:
    wrapper = engine.optimizer  # at stage 0 this is the optimizer itself
    optimizer = engine.basic_optimizer
    clip = getattr(wrapper, "clip_grad", None)

    def visit_all(*args: Any, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    visit(p)

    norm = _unsharded_norm(engine)
    if clip is not None:
        wrapper.clip_grad = 0.0
    optimizer.step = visit_all
    try:
        if norm is None or _is_good(norm):
            with torch.no_grad():
                wrapper.step()
    finally:
        del optimizer.step
        if clip is not None:
            wrapper.clip_grad = clip
    norm = float(wrapper._global_grad_norm) if norm is None else norm
    (engine if wrapper is optimizer else wrapper).zero_grad()
    _clear_stale_gradients(wrapper)
    return norm


def consolidated_state(engine: Any) -> dict[str, Tensor] | None:
    """All weights in the engine's dtype on rank 0, None elsewhere. A collective: every rank must call it."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict() if torch.distributed.get_rank() == 0 else None
    if state is None:
        return None
    return {name.removeprefix("model."): tensor.detach().cpu() for name, tensor in state.items()}


def _clear_stale_gradients(wrapper: Any) -> None:
    """ZeRO-3 would apply the last gradient again to parameters that get none in the next step."""
    buffer = getattr(wrapper, "grad_partitions_flat_buffer", None)
    if buffer is None:
        return
    buffer.zero_()
    if wrapper.offload_optimizer:
        for p in wrapper.fp32_partitioned_groups_flat:
            if p.grad is not None:
                p.grad.zero_()
