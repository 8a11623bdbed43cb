"""Phi-2, Phi-3, Phi-3.5-MoE and Phi-4: q, k and v in one tensor, part of each head rotated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.constants import rope_factors_longrope
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, DECODER, Rule, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_PARALLEL = (*ATTENTION, "ffn_up", "ffn_down")  # Phi-2 has one norm for attention and feed-forward


@architecture("PhiForCausalLM")
def phi2(model: HFModel) -> GGUFModelSpec:
    keys = {
        "context_length": u32(model.require("n_positions", "max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("intermediate_size") or 4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.heads),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon", "layer_norm_eps")),
        "rope.dimension_count": u32(_rotated(model)),
        **FILE_TYPE,
        "tokenizer.ggml.add_bos_token": boolean(False),
    }
    return make_spec(model, "phi2", keys, vocab="gpt2", required_per_block=_PARALLEL)


@architecture("Phi3ForCausalLM", "Phi4ForCausalLMV")
def phi3(model: HFModel) -> GGUFModelSpec:
    return _phi3(model, "phi3", {})


@architecture("PhiMoEForCausalLM", "PhimoeForCausalLM")
def phimoe(model: HFModel) -> GGUFModelSpec:
    keys = {
        "expert_used_count": u32(model.require("num_experts_per_tok", "num_experts_per_token")),
        "expert_count": u32(model.require("num_local_experts", "num_experts")),
    }
    text = "llama.cpp weights the selected experts by softmax, Phi-3.5-MoE by its sparse mixer: answers differ slightly"
    return _phi3(model, "phimoe", keys, stacked_experts, notes=(WarningText(text),))


def _phi3(model: HFModel, arch: str, more: dict[str, Value], *rules: Rule, notes: Sequence[str] = ()) -> GGUFModelSpec:
    factors = rope_factors_longrope(model, _rotated(model))
    keys = (_stretch(model) if factors else {}) | _phi3_keys(model) | more
    return make_spec(
        model, arch, keys, *rules, vocab="phi3", required_per_block=DECODER, constants=factors, notes=notes
    )


def _phi3_keys(model: HFModel) -> dict[str, Value]:
    return {
        "context_length": u32(_context(model)),
        "rope.scaling.original_context_length": u32(_original_context(model)),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(model.require("rms_norm_eps")),
        "rope.dimension_count": u32(_rotated(model)),
        "rope.freq_base": f32(model.full_rope.get("rope_theta", 10000.0)),
        **FILE_TYPE,
        # 0 means no window (Phi-4): without the key llama.cpp uses 2047
        "attention.sliding_window": u32(model.find("sliding_window") or 0),
    }


def _rotated(model: HFModel) -> int:
    """The number of rotated dimensions of a head."""
    return int(model.rope.get("partial_rotary_factor", 1.0) * model.hidden) // model.heads


def _context(model: HFModel) -> int:
    return int(model.require("n_positions", "max_position_embeddings"))


def _original_context(model: HFModel) -> int:
    """The pretraining context; without longrope it is the context."""
    return int(model.rope.get("original_max_position_embeddings") or _context(model))


def _stretch(model: HFModel) -> dict[str, Value]:
    """longrope's attention factor (transformers: _compute_longrope_parameters)."""
    scale = _context(model) / _original_context(model)
    kind = str(model.rope.get("rope_type", "")).lower()
    if kind not in ("su", "longrope", "yarn"):
        raise SourceError(f"config.json: long_factor with rope type '{kind}'", hint="the rope type must be longrope")
    if scale <= 1:
        factor = 1.0
    elif kind == "yarn":
        factor = 0.1 * math.log(scale) + 1
    else:
        factor = math.sqrt(1 + math.log(scale) / math.log(_original_context(model)))
    return {"rope.scaling.attn_factor": f32(factor)}
