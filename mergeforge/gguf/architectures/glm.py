"""GLM-4 and later, dense and with experts, ChatGLM, and Solar Open; the text parts of GLM-4V."""

from __future__ import annotations

import numpy as np

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.deepseek import indexer_keys, latent_attention_spec
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import FILE_TYPE, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, u32

_SIGMOID = 2
_FUSED = ("attn_norm", "attn_q|attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
_AROUND = (*_FUSED, "post_attention_norm", "post_ffw_norm")


@architecture("Glm4ForCausalLM", "Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration")
def glm4(model: HFModel) -> GGUFModelSpec:
    """GLM-4-0414. GLM-OCR has a layer that predicts a further token."""
    extra = prediction_layers(model, shift=0.0)
    keys = hparams(model) | {"block_count": u32(model.layers + extra.count), **_rotated(model)}
    return make_spec(
        model,
        "glm4",
        keys | prediction_layer_keys(extra.count, _states_layers(model)),
        extra.rule,
        deinterleaved_rope,
        vocab="glm4",
        required_per_block=_AROUND,
        layers=model.layers + extra.count,
        notes=extra.notes,
    )


@architecture("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration")
def glm4moe(model: HFModel) -> GGUFModelSpec:
    return _with_experts(model, "glm4_moe")


@architecture("SolarOpenForCausalLM")
def solar_open(model: HFModel) -> GGUFModelSpec:
    return _with_experts(model, "solar_open")


@architecture("Glm4MoeLiteForCausalLM")
def glm4_moe_lite(model: HFModel) -> GGUFModelSpec:
    """GLM-4.7-Flash: DeepSeek's latent attention."""
    return latent_attention_spec(model, vocab="glm4_moe", extra=prediction_layers(model, shift=0.0))


@architecture("GlmMoeDsaForCausalLM")
def glm_dsa(model: HFModel) -> GGUFModelSpec:
    """GLM-5: latent attention to tokens that an indexer selects."""
    rotated = int(int(model.require("qk_rope_head_dim")) * model.rope.get("partial_rotary_factor", 1.0))
    extra = prediction_layers(model, shift=0.0)
    keys = {
        "rope.dimension_count": u32(rotated),
        **prediction_layer_keys(extra.count, _states_layers(model)),
        **indexer_keys(model),
    }
    if (kinds := model.find("indexer_types")) is not None:
        keys["attention.indexer.types"] = array("bool", [kind == "full" for kind in kinds])
    return latent_attention_spec(model, "glm4_moe", extra, "glm-dsa", keys)


@architecture("ChatGLMModel", "ChatGLMForConditionalGeneration", "GlmForCausalLM")
def chatglm(model: HFModel) -> GGUFModelSpec:
    size = model.find("attention_dim") or model.hidden // model.heads
    keys = {
        "context_length": u32(model.find("seq_length") or model.hidden),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("ffn_hidden_size", "intermediate_size") or 4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.find("multi_query_group_num", "num_key_value_heads") or model.heads),
        "attention.layer_norm_rms_epsilon": f32(model.find("layernorm_epsilon") or 1e-5),
        **FILE_TYPE,
        "rope.dimension_count": u32(int(size * model.rope.get("partial_rotary_factor", 0.5))),
        "tokenizer.ggml.add_bos_token": boolean(False),
        "rope.freq_base": f32(10000 * (model.find("rope_ratio") or 1)),
    }
    return make_spec(
        model,
        "chatglm",
        keys,
        rotary_buffer,
        vocab="chatglm",
        required_per_block=_FUSED,
        rename=lambda name: name.removeprefix("transformer."),
    )


def _with_experts(model: HFModel, vocab: str) -> GGUFModelSpec:
    extra = prediction_layers(model, shift=0.0)
    keys = hparams(model) | {"block_count": u32(model.layers + extra.count), **_rotated(model)}
    keys |= _expert_keys(model) | prediction_layer_keys(extra.count, _states_layers(model))
    return make_spec(
        model,
        "glm4moe",
        keys,
        extra.rule,
        stacked_experts,
        vocab=vocab,
        required_per_block=(*ATTENTION, *GATED[len(ATTENTION) + 1 :]),
        layers=model.layers + extra.count,
        notes=extra.notes,
    )


def _states_layers(model: HFModel) -> bool:
    return model.find("num_nextn_predict_layers") is not None


def _expert_keys(model: HFModel) -> dict[str, Value]:
    keys = optional(
        u32,
        expert_count=model.find("n_routed_experts"),
        expert_feed_forward_length=model.find("moe_intermediate_size"),
        expert_shared_count=model.find("n_shared_experts"),
        leading_dense_block_count=model.find("first_k_dense_replace"),
    )
    keys["expert_gating_func"] = u32(_SIGMOID)
    keys |= optional(f32, expert_weights_scale=model.find("routed_scaling_factor"))
    return keys | optional(boolean, expert_weights_norm=model.find("norm_topk_prob"))


def _rotated(model: HFModel) -> dict[str, Value]:
    return {"rope.dimension_count": u32(int(model.head_dim * model.rope.get("partial_rotary_factor", 0.5)))}


def rotary_buffer(stored: HFTensor) -> RuleResult:
    return "a buffer" if stored.name.endswith("rotary_pos_emb.inv_freq") else None


def deinterleaved_rope(stored: HFTensor) -> RuleResult:
    """With mrope, llama.cpp rotates halves: even rows of a head's rotated part come first, then the odd ones."""
    name = stored.name.rpartition(".")[0]
    if "mrope_section" not in stored.model.rope or not name.endswith(("q_proj", "k_proj")):
        return None
    model = stored.model
    heads = model.heads if name.endswith("q_proj") else model.kv_heads
    size = stored.rows_per_part(heads)
    rotated = int(model.head_dim * model.rope.get("partial_rotary_factor", 0.5))
    order = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, size)])
    rows = (np.arange(heads, dtype=np.int64)[:, None] * size + order).reshape(-1)
    return (stored.tensor(rows=rows),)
