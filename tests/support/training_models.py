"""Tiny random models of several families, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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


TEXT = {name: size for name, size in SIZES.items() if not name.endswith("token_id")}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
QWEN_VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "fullatt_block_indexes": [1]}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LINEAR_ATTENTION |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"]}
# vision-language models: config.json's text_config beyond TEXT, vision_config, and what else it has
VISION_LANGUAGE: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "gemma3": ({}, VISION | {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
    "gemma4": (PER_LAYER | {"num_global_key_value_heads": 2, "global_head_dim": 8}, None, {"audio_config": None}),
    "qwen2_5_vl": (ROPE, QWEN_VISION, {}),
    "qwen3_vl": (ROPE, QWEN_VISION, {}),
    "qwen3_vl_moe": (ROPE | EXPERTS | {"decoder_sparse_step": 1}, QWEN_VISION, {}),
    "qwen3_5": (ROPE | LINEAR_ATTENTION, QWEN_VISION, {}),
    "llava": ({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {"image_token_id": 5}),
    "paligemma": ({"model_type": "gemma"}, VISION | {"model_type": "siglip_vision_model"}, {"projection_dim": 32}),
    "mistral3": ({"model_type": "mistral"}, VISION | {"model_type": "pixtral"}, {"image_token_id": 5}),
    "smolvlm": ({"model_type": "llama"}, VISION, {"image_token_id": 5, "scale_factor": 2}),
}


def write_tiny(folder: Path, family: str, **config: object) -> Path:
    """Write a float32 model of the family, with weights large enough to make a difference."""
    torch.manual_seed(0)
    keys = {**SIZES, **FAMILY_KEYS.get(family, {}), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys, initializer_range=0.2))
    model.save_pretrained(folder / family)
    return folder / family


def write_tiny_vision_language(folder: Path, family: str, vocab_size: int) -> Path:
    """Write a float32 vision-language model, with weights large enough to make a difference."""
    text, vision, keys = VISION_LANGUAGE[family]
    text = {**TEXT, "vocab_size": vocab_size, "initializer_range": 0.2, "pad_token_id": 0, **text}
    text |= {"vocab_size_per_layer_input": vocab_size} if "vocab_size_per_layer_input" in text else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **keys)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(folder / family)
    return folder / family
