"""Gemma 1, 2 and 3: norms count from one, output tied to the embedding."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import head_notes, score_notes, window_notes
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes, optional, text_keys
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.tensor_mapping import GATED, Answer, Stored, spelled, unread_head
from mergeforge.gguf.key_values import Value, f32, u32

_AROUND = (*GATED, "post_attention_norm", "post_ffw_norm")  # Gemma 2 and 3 norm before and after


@architecture("GemmaForCausalLM")
def gemma(model: Model) -> GGUFModelSpec:
    keys = _own_keys(model)
    return spelled(model, "gemma", keys, unread_head, norms, vocab="gemma", notes=head_notes(model))


@architecture("Gemma2ForCausalLM")
def gemma2(model: Model) -> GGUFModelSpec:
    keys = _own_keys(model) | {
        "attn_logit_softcapping": f32(model.need("attn_logit_softcapping")),
        "final_logit_softcapping": f32(model.need("final_logit_softcapping")),
        "attention.sliding_window": u32(model.need("sliding_window")),
    }
    return spelled(
        model,
        "gemma2",
        keys,
        unread_head,
        norms,
        vocab="gemma",
        needs=_AROUND,
        notes=(*score_notes(model, "gemma2"), *window_notes(model, True, period=2), *head_notes(model)),
    )


@architecture("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
def gemma3(model: Model) -> GGUFModelSpec:
    if model.find("attn_logit_softcapping") is not None:
        raise SourceError("config.json: llama.cpp's Gemma 3 has no attn_logit_softcapping", hint="set it to null")
    keys = text_keys(model) | head_sizes(model.find("head_dim") or 256)
    keys |= optional(f32, final_logit_softcapping=model.find("final_logit_softcapping") or None)
    if model.find("sliding_window_pattern") != 1:
        keys["attention.sliding_window"] = u32(model.need("sliding_window"))
    notes = (*score_notes(model, "gemma3"), *window_notes(model, True, period=6))
    return spelled(model, "gemma3", keys, embedding, norms, vocab="gemma3", needs=_AROUND, notes=notes)


def _own_keys(model: Model) -> dict[str, Value]:
    return {
        "context_length": u32(model.need("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.need("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(model.need("rms_norm_eps")),
        **head_sizes(model.need("head_dim")),
        **FILE_TYPE,
    }


def norms(stored: Stored) -> Answer:
    """Stored norms are offsets from one."""
    return (stored.at(add=1.0),) if stored.name.endswith("norm.weight") else None


def embedding(stored: Stored) -> Answer:
    """Rows beyond the vocabulary have no token and go."""
    size = stored.model.find("vocab_size")
    if "embed_tokens.weight" not in stored.name or not size or stored.info.rows <= size:
        return None
    import numpy as np

    return (stored.at(shape=(size, stored.info.columns), rows=np.arange(size, dtype=np.int64)),)
