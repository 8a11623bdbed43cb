"""Phi-2, Phi-3, Phi-3.5-MoE and Phi-4: queries, keys and values in one tensor, part of a head rotated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.constants import long_factors
from mergeforge.gguf.architectures.experts import stacked
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, DECODER, Rule, spelled
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_PARALLEL = (*ATTENTION, "ffn_up", "ffn_down")  # Phi-2 has one norm for attention and feed-forward


@architecture("PhiForCausalLM")
def phi2(model: Model) -> GGUFModelSpec:
    keys = {
        "context_length": u32(model.need("n_positions", "max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("intermediate_size") or 4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.heads),
        "attention.layer_norm_epsilon": f32(model.need("layer_norm_epsilon", "layer_norm_eps")),
        "rope.dimension_count": u32(_rotated(model)),
        **FILE_TYPE,
        "tokenizer.ggml.add_bos_token": boolean(False),
    }
    return spelled(model, "phi2", keys, vocab="gpt2", needs=_PARALLEL)


@architecture("Phi3ForCausalLM", "Phi4ForCausalLMV")
def phi3(model: Model) -> GGUFModelSpec:
    return _phi3(model, "phi3", {})


@architecture("PhiMoEForCausalLM", "PhimoeForCausalLM")
def phimoe(model: Model) -> GGUFModelSpec:
    keys = {
        "expert_used_count": u32(model.need("num_experts_per_tok", "num_experts_per_token")),
        "expert_count": u32(model.need("num_local_experts", "num_experts")),
    }
    note = "llama.cpp weighs the chosen experts by softmax, Phi-3.5-MoE by its sparse mixer: answers differ a little"
    return _phi3(model, "phimoe", keys, stacked, notes=(note,))


def _phi3(model: Model, arch: str, more: dict[str, Value], *rules: Rule, notes: Sequence[str] = ()) -> GGUFModelSpec:
    factors = long_factors(model, _rotated(model))
    keys = (_stretch(model) if factors else {}) | _phi3_keys(model) | more
    return spelled(model, arch, keys, *rules, vocab="phi3", needs=DECODER, constants=factors, notes=notes)


def _phi3_keys(model: Model) -> dict[str, Value]:
    return {
        "context_length": u32(_context(model)),
        "rope.scaling.original_context_length": u32(_original_context(model)),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.need("intermediate_size")),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(model.need("rms_norm_eps")),
        "rope.dimension_count": u32(_rotated(model)),
        "rope.freq_base": f32(model.full_rope.get("rope_theta", 10000.0)),
        **FILE_TYPE,
        # zero tells llama.cpp that there is no window (Phi-4): without the key it takes 2047
        "attention.sliding_window": u32(model.find("sliding_window") or 0),
    }


def _rotated(model: Model) -> int:
    """Dimensions of a head that are rotated."""
    return int(model.rope.get("partial_rotary_factor", 1.0) * model.hidden) // model.heads


def _context(model: Model) -> int:
    return int(model.need("n_positions", "max_position_embeddings"))


def _original_context(model: Model) -> int:
    """The context of pretraining; without longrope it is the context."""
    return int(model.rope.get("original_max_position_embeddings") or _context(model))


def _stretch(model: Model) -> dict[str, Value]:
    """longrope's factor of attention (transformers: _compute_longrope_parameters)."""
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
