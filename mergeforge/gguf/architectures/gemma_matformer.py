"""Gemma 3n and Gemma 4: embeddings for each layer, key-value layers shared by later ones; EmbeddingGemma."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import attention_scale_warnings
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.gemma import embedding, norms
from mergeforge.gguf.architectures.hparams import head_sizes, hparams, layer_counts, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32

_AROUND = (*GATED, "post_attention_norm", "post_ffw_norm")
_SHARED = ("attn_norm", "attn_q", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "post_attention_norm")
_STREAMS = 4
_MASKED = np.float32(1e30)  # divides the frequency of dimensions that are not rotated


@architecture("Gemma3TextModel")
def embedding_gemma(model: HFModel) -> GGUFModelSpec:
    """The window is the stated one, though transformers halves it for attention in both directions."""
    keys = _gemma3_keys(model) | {"attention.sliding_window": u32(model.original_config["sliding_window"])}
    return make_spec(
        model,
        "gemma-embedding",
        keys | pooling_keys(model),
        embedding,
        norms,
        vocab="gemma3",
        required_per_block=_AROUND,
        notes=(*attention_scale_warnings(model, "gemma-embedding"), *pooling_notes(model)),
    )


@architecture("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration")
def gemma3n(model: HFModel) -> GGUFModelSpec:
    if model.require("altup_num_inputs") != _STREAMS:
        raise SourceError(f"config.json: llama.cpp's Gemma 3n has {_STREAMS} altup_num_inputs")
    keys = _gemma3_keys(model) | {
        "altup.active_idx": u32(model.require("altup_active_idx")),
        "altup.num_inputs": u32(_STREAMS),
        "embedding_length_per_layer_input": u32(model.require("hidden_size_per_layer_input")),
        "attention.shared_kv_layers": u32(model.require("num_kv_shared_layers")),
        "activation_sparsity_scale": array("f32", _sparsity(model)),
        "attention.sliding_window_pattern": _pattern(model),
    }
    return make_spec(
        model,
        "gemma3n",
        keys,
        stacked_projections,
        embedding,
        vocab="gemma3",
        required_per_block=_SHARED,
        rename=lambda name: f"{name}.weight" if name.endswith("_scale") else name,
    )


@architecture("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM")
def gemma4(model: HFModel) -> GGUFModelSpec:
    sliding = int(model.require("head_dim"))
    full = int(model.find("global_head_dim") or _of_full_attention(model, "head_dim") or sliding)
    shared = int(model.require("num_kv_shared_layers"))
    keys = _gemma3_keys(model) | {
        "attention.shared_kv_layers": u32(shared),
        "embedding_length_per_layer_input": u32(model.find("hidden_size_per_layer_input") or 0),
        "attention.sliding_window_pattern": _pattern(model),
        **head_sizes(full),
        "attention.key_length_swa": u32(sliding),
        "attention.value_length_swa": u32(sliding),
    }
    keys |= optional(u32, expert_feed_forward_length=model.find("expert_intermediate_size", "moe_intermediate_size"))
    keys |= _layer_sizes(model, shared)
    partial = model.rope.get("partial_rotary_factor", 1.0)
    keys |= {"rope.dimension_count": u32(full), "rope.dimension_count_swa": u32(int(sliding * partial))}
    return make_spec(
        model,
        "gemma4",
        keys,
        router_scales,
        embedding,
        stacked_experts,
        vocab="gemma4",
        required_per_block=_SHARED,
        rename=_gemma4_name,
        constants=_proportional_rope(model, full),
    )


def _gemma3_keys(model: HFModel) -> dict[str, Value]:
    keys = hparams(model) | head_sizes(model.find("head_dim") or 256)
    keys |= optional(f32, final_logit_softcapping=model.find("final_logit_softcapping") or None)
    if model.find("sliding_window_pattern") != 1:
        keys["attention.sliding_window"] = u32(model.require("sliding_window"))
    return keys


def _pattern(model: HFModel) -> Value:
    return array("bool", [kind == "sliding_attention" for kind in model.require("layer_types")])


def _sparsity(model: HFModel) -> list[float]:
    """How many standard deviations above the mean an activation must be, for each layer."""
    import torch

    parts = torch.tensor(model.require("activation_sparsity_pattern"), dtype=torch.float32)
    return [float(value) for value in torch.erfinv(2 * parts - 1) * math.sqrt(2)]


def _layer_sizes(model: HFModel, shared: int) -> dict[str, Value]:
    """Widths and key-value heads that differ between layers."""
    keys: dict[str, Value] = {}
    if model.find("use_double_wide_mlp"):
        width, first = int(model.require("intermediate_size")), model.layers - shared
        keys |= layer_counts("feed_forward_length", [width if at < first else 2 * width for at in range(model.layers)])
    full = model.find("num_global_key_value_heads")
    full = _of_full_attention(model, "num_key_value_heads") if full is None else full
    sliding = model.find("num_key_value_heads")
    if full is not None and sliding is not None:
        kinds = model.require("layer_types")
        groups = [sliding if kind == "sliding_attention" else full for kind in kinds]
        keys |= layer_counts("attention.head_count_kv", groups)
    return keys


def _of_full_attention(model: HFModel, key: str) -> Any:
    """What per_layer_config says about a layer with full attention (transformers 5), or None."""
    kinds = model.require("layer_types")
    layers: Mapping[str, Any] = model.find("per_layer_config") or {}
    found = (own[key] for at, own in layers.items() if key in own and kinds[int(at)] == "full_attention")
    return next(found, None)


def _proportional_rope(model: HFModel, size: int) -> Mapping[str, np.ndarray]:
    """rope_freqs.weight: only the first part of each head is rotated in layers with full attention."""
    rope = model.full_rope
    if rope.get("rope_type") != "proportional":
        raise SourceError("config.json: Gemma 4 needs rope type 'proportional' for full attention")
    rotated = int(size * rope["partial_rotary_factor"] / 2)
    divisors = np.full(size // 2, _MASKED, dtype=np.float32)
    divisors[:rotated] = 1.0
    return {"rope_freqs.weight": divisors}


def _gemma4_name(name: str) -> str:
    if name.endswith(("per_dim_scale", "layer_scalar")):
        return f"{name}.weight"
    return f"{name}.weight" if ".experts." in name and not name.endswith(".weight") else name


def router_scales(stored: HFTensor) -> RuleResult:
    for ending, part in (("router.scale", "ffn_gate_inp"), (".per_expert_scale", "ffn_down_exps")):
        if stored.name.endswith(ending):
            return (stored.tensor(f"blk.{stored.layer}.{part}.scale"),)
    return None


def stacked_projections(stored: HFTensor) -> RuleResult:
    """The altup projections of the three further streams become one tensor."""
    for kind, part in (("altup_unembed_projections", "altup_unembd_proj"), ("altup_projections", "altup_proj")):
        if kind in stored.name:
            at = int(stored.name.rpartition(".weight")[0].rpartition(".")[2])
            shape = (_STREAMS - 1, *stored.info.shape)
            return (stored.tensor(f"{part}.weight", shape, first_row=at * stored.info.rows),)
    return None
