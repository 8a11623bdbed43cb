"""Tiny random models of several families, made by transformers."""

from __future__ import annotations

import copy
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
    "falcon": {"head_dim": None},  # it computes this one
    "phi": {"num_key_value_heads": 4},
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
SHARED_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
SHARED_EXPERTS |= {"n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
JAMBA |= {"mamba_d_state": 8, "use_mamba_kernels": False}
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MAMBA_2 |= {"mamba_d_ssm": 32, "mamba_expand": 1, "attn_layer_indices": [1]}
# the last two layers take keys and values of the first two, as in Gemma 3n and in Gemma 4 E2B and E4B
PER_LAYER = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
PER_LAYER |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LAUREL = {"laurel_rank": 4, "altup_num_inputs": 4, "intermediate_size": [64] * 4}
LAUREL |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
LLAMA_4 = EXPERTS | {"num_hidden_layers": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2}
LLAMA_4_VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_4_VISION |= {"image_size": 16, "patch_size": 8, "vision_output_dim": 32, "pixel_shuffle_ratio": 0.5}
LLAMA_4_VISION |= {"projector_input_dim": 32, "projector_output_dim": 32}
MLLAMA = {"num_hidden_layers": 3, "cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2}
MLLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MLLAMA_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
MLLAMA_VISION |= {"attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 64}
MLLAMA_VISION |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
GLM_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
GLM_VISION |= {"image_size": 16, "patch_size": 8}
ERNIE_VL = EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [32, 32]}
ERNIE_VL |= {"mlp_layer_types": ["dense", "sparse"]}
HALF_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
# text models: what their configuration has beyond SIZES
TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA_2,
    "deepseek_v3": EXPERTS | LATENT,
    "dots1": {"num_key_value_heads": 4} | SHARED_EXPERTS,
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "falcon_h1": MAMBA_2,
    "gemma3n_text": PER_LAYER | LAUREL,
    "gemma4_text": PER_LAYER | {"num_global_key_value_heads": 2, "global_head_dim": 8},
    "glm4_moe": SHARED_EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoehybrid": EXPERTS | MAMBA_2 | {"layer_types": ["attention", "mamba"]},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "jamba": EXPERTS | JAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": LLAMA_4,
    "minimax_m2": EXPERTS,
    "nemotron_h": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"]},
    "olmoe": EXPERTS | {"num_key_value_heads": 4},
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_next": EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32},
    **{name: {} for name in ("cohere2", "ernie4_5", "exaone4", "falcon", "hunyuan_v1_dense", "mpt", "nemotron")},
    **{name: {} for name in ("olmo3", "phi", "phi3", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2")},
}
# vision-language models: config.json's text_config beyond TEXT, vision_config, and what else it has
VISION_LANGUAGE: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "gemma3": (
        {"query_pre_attn_scalar": 8},
        VISION | {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (PER_LAYER | {"num_global_key_value_heads": 2, "global_head_dim": 8}, None, {"audio_config": None}),
    "llama4": (LLAMA_4, LLAMA_4_VISION, {}),
    "mllama": (MLLAMA, MLLAMA_VISION, {}),
    "glm4v": (ROPE, GLM_VISION, {}),
    "glm4v_moe": (HALF_ROPE | SHARED_EXPERTS, GLM_VISION, {}),
    "ernie4_5_vl_moe": (ROPE | ERNIE_VL, GLM_VISION, {}),
    "qwen2_vl": (ROPE, QWEN_VISION | {"embed_dim": 32}, {}),
    "qwen3_5_moe": (ROPE | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32}, QWEN_VISION, {}),
    "idefics3": ({"model_type": "llama"}, VISION, {"image_token_id": 5, "scale_factor": 2}),
    "internvl": (
        {"model_type": "qwen2"},
        VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        {"image_token_id": 5},
    ),
    "llava_next": (
        {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model"},
        {"image_token_id": 5, "image_grid_pinpoints": [[16, 16]]},
    ),
    "aya_vision": ({"model_type": "cohere2"}, VISION | {"model_type": "siglip_vision_model"}, {"image_token_id": 5}),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        VISION | {"model_type": "siglip2_vision_model", "num_patches": 4},
        {"image_token_id": 5, "downsample_factor": 1},
    ),
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
    keys |= {"vocab_size_per_layer_input": keys["vocab_size"]} if "vocab_size_per_layer_input" in keys else {}
    keys = {name: value for name, value in keys.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys, initializer_range=0.2))
    for name, weight in model.named_parameters():
        if name.endswith("correct_output_scale"):  # zero in a new Gemma 3n: nothing would pass through its gates
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder / family)
    return folder / family


def write_tiny_vision_language(folder: Path, family: str, vocab_size: int) -> Path:
    """Write a float32 vision-language model, with weights large enough to make a difference."""
    text, vision, keys = copy.deepcopy(VISION_LANGUAGE[family])  # a configuration may change its parts
    text = {**TEXT, "vocab_size": vocab_size, "initializer_range": 0.2, "pad_token_id": 0, **text}
    text |= {"vocab_size_per_layer_input": vocab_size} if "vocab_size_per_layer_input" in text else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **keys)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(folder / family)
    return folder / family
