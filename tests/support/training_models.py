"""Tiny random models of several families, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY_KEYS = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
    },
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
}


def write_tiny(folder: Path, family: str, **config: object) -> Path:
    """Write a float32 model of the family, with weights large enough to make a difference."""
    torch.manual_seed(0)
    keys = {**SIZES, **FAMILY_KEYS.get(family, {}), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys, initializer_range=0.2))
    model.save_pretrained(folder / family)
    return folder / family
