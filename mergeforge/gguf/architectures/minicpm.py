"""MiniCPM 1: Llama with three scaling factors; MiniCPM 3: latent attention."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_factors_longrope
from mergeforge.gguf.architectures.hparams import FILE_TYPE, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import make_spec
from mergeforge.gguf.key_values import f32, u32


@architecture("MiniCPMForCausalLM")
def minicpm(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "embedding_scale": f32(model.require("scale_emb")),
        "residual_scale": f32(model.require("scale_depth") / model.layers**0.5),
        "logit_scale": f32(model.hidden / model.require("dim_model_base")),
    }
    constants = rope_factors_longrope(model, model.hidden // model.heads)
    return make_spec(model, "minicpm", keys, permute_rope_heads, vocab="spm", constants=constants)


@architecture("MiniCPM3ForCausalLM")
def minicpm3(model: HFModel) -> GGUFModelSpec:
    rotated = int(model.require("qk_rope_head_dim"))
    keys = {
        **FILE_TYPE,
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(model.require("rms_norm_eps")),
        "vocab_size": u32(model.require("vocab_size")),
        **optional(u32, attention__q_lora_rank=model.find("q_lora_rank")),
        "attention.kv_lora_rank": u32(model.require("kv_lora_rank")),
        "attention.key_length": u32(int(model.require("qk_nope_head_dim")) + rotated),
        "rope.dimension_count": u32(rotated),
    }
    needs = ("attn_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_output", "ffn_norm", "ffn_gate", "ffn_down")
    constants = rope_factors_longrope(model, rotated)
    return make_spec(model, "minicpm3", keys, vocab="spm", required_per_block=needs, constants=constants)
