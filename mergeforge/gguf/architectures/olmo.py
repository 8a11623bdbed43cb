"""OLMo 1, 2 and 3, OLMoE, and Seed-OSS."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32

_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
_BARE = (*ATTENTION[1:], *_FEED_FORWARD)  # OLMo 1's norms have no weights
_AFTER = (*_BARE, "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")


@architecture("OlmoForCausalLM", "OLMoForCausalLM")
def olmo(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"attention.layer_norm_epsilon": f32(1e-5)}
    keys |= optional(f32, attention__clamp_kqv=model.find("clip_qkv"))
    return make_spec(
        model, "olmo", keys, permute_rope_heads, vocab="gpt2", required_per_block=_BARE, required=("token_embd",)
    )


@architecture("Olmo2ForCausalLM", "Olmo3ForCausalLM")
def olmo2(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "olmo2", hparams(model) | _window(model), vocab="gpt2", required_per_block=_AFTER)


def _window(model: HFModel) -> dict[str, Value]:
    """OLMo 3: three of four layers have a sliding window."""
    if "sliding_window" not in model.config:
        return {}
    kinds = model.find("layer_types") or []
    slides = [kind == "sliding_attention" for kind in kinds] or [(at + 1) % 4 != 0 for at in range(model.layers)]
    return {
        "attention.sliding_window": u32(model.require("sliding_window")),
        "attention.sliding_window_pattern": array("bool", slides),
    }


@architecture("OlmoeForCausalLM")
def olmoe(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"attention.layer_norm_rms_epsilon": f32(1e-5)}
    return make_spec(
        model, "olmoe", keys, stacked_experts, vocab="gpt2", required_per_block=(*GATED, "attn_q_norm", "attn_k_norm")
    )


@architecture("SeedOssForCausalLM")
def seed_oss(model: HFModel) -> GGUFModelSpec:
    needs = (*ATTENTION, "attn_post_norm|post_attention_norm", *_FEED_FORWARD)
    return make_spec(model, "seed_oss", hparams(model), vocab="gpt2", required_per_block=needs)
