"""Tiny models of many families of transformers, with random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from components.models import load_tokenizer, save_model

_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "attention_hidden_size": 32,
    "word_embed_proj_dim": 32,
    "rotary_dim": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "xglm": {"num_layers": 2, "attention_heads": 2},
}


def tiny(family: str, **changes: Any) -> Any:
    """A random model in evaluation mode; its weights are large enough for answers to differ."""
    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **_OWN.get(family, {}), **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.12)
    return model


def tiny_folder(family: str, base: Path, folder: Path, **changes: Any) -> Path:
    """Such a model with the tokenizer of `base`."""
    save_model(tiny(family, **changes), load_tokenizer(base), folder)
    return folder


def by_hand(model: Any, prompt: list[int], new: int) -> list[int]:
    """The likeliest token after all so far, again and again: no batch, no cache, no transformers' generate."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
