"""Dream and LLaDA: models that fill in masked tokens."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys
from mergeforge.gguf.architectures.tensor_mapping import make_spec
from mergeforge.gguf.key_values import boolean, u32


@architecture("DreamModel")
def dream(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | pooling_keys(model) | {"attention.causal": boolean(False)}
    keys |= optional(u32, **{"tokenizer.ggml.mask_token_id": model.find("mask_token_id")})
    return make_spec(model, "dream", keys, vocab="spm_or_gpt2")


@architecture("LLaDAModelLM")
def llada(model: HFModel) -> GGUFModelSpec:
    hidden = int(model.require("hidden_size", "d_model"))
    keys = (
        hparams(model)
        | pooling_keys(model)
        | {
            "vocab_size": u32(model.require("vocab_size")),
            "rope.dimension_count": u32(model.find("head_dim") or hidden // model.heads),
            "context_length": u32(model.find("max_sequence_length") or 4096),
            "embedding_length": u32(model.find("d_model") or 4096),
            "feed_forward_length": u32(model.find("mlp_hidden_size") or 12288),
            "attention.causal": boolean(False),
            "diffusion.shift_logits": boolean(False),
        }
    )
    return make_spec(model, "llada", keys, permute_rope_heads, vocab="llada")
