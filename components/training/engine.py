"""The DeepSpeed engine: set up, step, Hessian pass and export, with the traps of DeepSpeed 0.19 kept shut."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.config import Train
from components.errors import TrainingError
from components.optimizers.soul import Soul


class AnswerLogits(nn.Module):
    """A causal language model that computes logits only where an answer token is predicted."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[rows, length] ids and [n] flat positions → [n, vocabulary] logits.

        No attention mask: rows are right-padded and attention is causal. Where `position_ids` begin anew within a row,
        transformers keeps the sequences apart, but only without an attention mask and without a cache.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, use_cache=False, **({} if position_ids is None else {"position_ids": position_ids})
        ).last_hidden_state
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions])


def deepspeed_config(train: Train) -> dict[str, Any]:
    """DeepSpeed's settings, those that matter said explicitly."""
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop sets the boundaries: a step may have any number of micro-batches
        "gradient_clipping": train.gradient_clipping,  # explicit: the default is 1.0 in this version, 0 in older ones
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": 5_000_000},
    }


def start_engine(model: PreTrainedModel, optimizer: torch.optim.Optimizer, train: Train) -> Any:
    """A DeepSpeed engine around `AnswerLogits(model)`; torch.distributed must be up already."""
    deepspeed = _import_deepspeed()
    # Used by DeepSpeed's inference only; building it would need a compiler and leaks shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=AnswerLogits(model), optimizer=optimizer, config=deepspeed_config(train), dist_init_required=False
    )
    engine.module.eval()  # no dropout: the KL to the original is 0 at the start, and a step does not depend on the rank
    if isinstance(optimizer, Soul):
        _materialise_state(engine, optimizer)
    return engine


def _import_deepspeed() -> Any:
    logging.disable(logging.WARNING)  # on import it warns of every machine without a GPU
    try:
        import deepspeed
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Accumulate gradients; `last` marks the step's last micro-batch."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def optimizer_step(engine: Any) -> float:
    """Clip, update, forget the gradients. Returns the global gradient norm before clipping.

    Raises:
        TrainingError: on all ranks alike, and without an update, when the norm is not finite.
    """
    norm = _unsharded_norm(engine)
    engine.step()  # with ZeRO it skips the update itself when the norm is not finite
    _clear_stale_gradients(engine.optimizer)
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    _check_norm(norm, "Gradient")
    return norm


def _unsharded_norm(engine: Any) -> float | None:
    """Gradient norm at stage 0 in fp32, where DeepSpeed keeps none and would update whatever it is; else None."""
    if engine.optimizer is not engine.basic_optimizer:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    _check_norm(norm, "Gradient")
    return norm


def _check_norm(norm: float, what: str) -> None:
    if not math.isfinite(norm) or norm < 0:  # ZeRO says -1 for an overflow
        raise TrainingError(
            f"{what} is not finite (norm={norm}). Expected a finite one; no parameter was changed by it. Lower "
            "optimizer.lr or objective.forget.weight, or set train.gradient_clipping."
        )


@contextmanager
def hessian_step(engine: Any, optimizer: Soul, tokens: int) -> Iterator[None]:
    """Inside, run `backward` on the mean loss of `tokens` sampled labels; on leaving, the Hessian is refreshed.

    Goes through ZeRO's wrapper and not through `engine.step()`, which would also count a step; clipping is off, since
    the Hessian needs the true scale. Must not run between the micro-batches of a training step.
    """
    wrapper = engine.optimizer  # at stage 0 in fp32 this is the optimizer itself
    clip = getattr(wrapper, "clip_grad", None)
    if clip is not None:
        wrapper.clip_grad = 0.0
    optimizer.mode, optimizer.hessian_tokens = "hessian", float(tokens)
    try:
        yield
        norm = _unsharded_norm(engine)
        wrapper.step()
        _check_norm(float(wrapper._global_grad_norm) if norm is None else norm, "Gradient of the sampled labels")
        (engine if wrapper is optimizer else wrapper).zero_grad()
        _clear_stale_gradients(wrapper)
    finally:
        optimizer.mode = "parameters"
        if clip is not None:
            wrapper.clip_grad = clip


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
    if buffer is not None:
        buffer.zero_()


def _materialise_state(engine: Any, optimizer: Soul) -> None:
    """Make m and h before the first step: ZeRO-1 and 2 link their views of the state only once."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for p in flat or [p for group in optimizer.param_groups for p in group["params"]]:
        optimizer.init_state(p)
