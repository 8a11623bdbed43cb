"""Gemma 1, 2 and 3: norms are stored as offsets from one, and the output is tied to the embedding."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import (
    attention_scale_warnings,
    output_head_notes,
    sliding_window_warnings,
)
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import GATED, HFTensor, RuleResult, make_spec, unused_head
from mergeforge.gguf.key_values import Value, f32, u32

_AROUND = (*GATED, "post_attention_norm", "post_ffw_norm")  # Gemma 2 and 3 have norms before and after


@architecture("GemmaForCausalLM")
def gemma(model: HFModel) -> GGUFModelSpec:
    keys = _own_keys(model)
    return make_spec(model, "gemma", keys, unused_head, norms, vocab="gemma", notes=output_head_notes(model))


@architecture("Gemma2ForCausalLM")
def gemma2(model: HFModel) -> GGUFModelSpec:
    keys = _own_keys(model) | {
        "attn_logit_softcapping": f32(model.require("attn_logit_softcapping")),
        "final_logit_softcapping": f32(model.require("final_logit_softcapping")),
        "attention.sliding_window": u32(model.require("sliding_window")),
    }
    return make_spec(
        model,
        "gemma2",
        keys,
        unused_head,
        norms,
        vocab="gemma",
        required_per_block=_AROUND,
        notes=(
            *attention_scale_warnings(model, "gemma2"),
            *sliding_window_warnings(model, True, period=2),
            *output_head_notes(model),
        ),
    )


@architecture("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
def gemma3(model: HFModel) -> GGUFModelSpec:
    if model.find("attn_logit_softcapping") is not None:
        raise SourceError("config.json: llama.cpp's Gemma 3 has no attn_logit_softcapping", hint="set it to null")
    keys = hparams(model) | head_sizes(model.find("head_dim") or 256)
    keys |= optional(f32, final_logit_softcapping=model.find("final_logit_softcapping") or None)
    if model.find("sliding_window_pattern") != 1:
        keys["attention.sliding_window"] = u32(model.require("sliding_window"))
    notes = (*attention_scale_warnings(model, "gemma3"), *sliding_window_warnings(model, True, period=6))
    return make_spec(model, "gemma3", keys, embedding, norms, vocab="gemma3", required_per_block=_AROUND, notes=notes)


def _own_keys(model: HFModel) -> dict[str, Value]:
    return {
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(model.require("rms_norm_eps")),
        **head_sizes(model.require("head_dim")),
        **FILE_TYPE,
    }


def norms(stored: HFTensor) -> RuleResult:
    """Stored norms are offsets from one."""
    return (stored.tensor(add=1.0),) if stored.name.endswith("norm.weight") else None


def embedding(stored: HFTensor) -> RuleResult:
    """Rows beyond the vocabulary have no token and are dropped."""
    size = stored.model.find("vocab_size")
    if "embed_tokens.weight" not in stored.name or not size or stored.info.rows <= size:
        return None
    import numpy as np

    return (stored.tensor(shape=(size, stored.info.columns), rows=np.arange(size, dtype=np.int64)),)
