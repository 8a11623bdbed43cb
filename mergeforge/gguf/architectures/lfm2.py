"""LFM2: short convolutions in most layers; with experts; its encoders."""

from __future__ import annotations

from dataclasses import replace

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.bailing_moe import expert_bias_name
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_SIGMOID = 2
_NEEDS = (
    *("attn_norm", "attn_q|shortconv.in_proj", "attn_output|shortconv.out_proj", "ffn_norm"),
    *("ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps"),
)
_ONCE = ("token_embd", "output_norm|token_embd_norm")


@architecture("Lfm2ForCausalLM", "LFM2ForCausalLM")
def lfm2(model: HFModel) -> GGUFModelSpec:
    return make_spec(
        model,
        "lfm2",
        _keys(model),
        short_convolution,
        vocab="gpt2",
        required_per_block=_NEEDS,
        required=_ONCE,
        rename=lambda name: name.replace("lfm.", "model."),
    )


@architecture("Lfm2Model", "Lfm2BidirectionalModel", "Lfm2BidirectionalForMaskedLM")
def lfm2_encoder(model: HFModel) -> GGUFModelSpec:
    keys = _keys(model)
    if model.name != "Lfm2Model":
        keys["attention.causal"] = boolean(False)
    return make_spec(
        model,
        "lfm2",
        keys | pooling_keys(model),
        short_convolution,
        vocab="gpt2",
        required_per_block=_NEEDS,
        required=_ONCE,
        rename=lambda name: "model." + name.removeprefix("lfm2."),
        notes=pooling_notes(model),
    )


@architecture("Lfm2MoeForCausalLM")
def lfm2_moe(model: HFModel) -> GGUFModelSpec:
    keys = hparams(_with_attention_layers(model)) | {
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "leading_dense_block_count": u32(model.require("num_dense_layers")),
        "expert_gating_func": u32(_SIGMOID),
        "vocab_size": u32(model.require("vocab_size")),
        "shortconv.l_cache": u32(model.require("conv_L_cache")),
    }
    return make_spec(
        model,
        "lfm2moe",
        keys,
        short_convolution,
        stacked_experts,
        vocab="gpt2",
        required_per_block=_NEEDS,
        required=_ONCE,
        rename=expert_bias_name,
    )


def _keys(model: HFModel) -> dict[str, Value]:
    return hparams(_with_attention_layers(model)) | {
        "vocab_size": u32(model.require("vocab_size")),
        "shortconv.l_cache": u32(model.require("conv_L_cache")),
        "attention.layer_norm_rms_epsilon": f32(model.require("norm_eps")),
        "feed_forward_length": u32(_width(model)),
    }


def _with_attention_layers(model: HFModel) -> HFModel:
    """Key-value heads are a list: none in layers with convolutions."""
    kinds = model.require("layer_types")
    groups = [model.kv_heads if kind == "full_attention" else 0 for kind in kinds]
    return replace(model, config={**model.config, "num_key_value_heads": groups})


def _width(model: HFModel) -> int:
    """The feed-forward's width as transformers computes it (Lfm2MLP)."""
    width = int(model.require("block_ff_dim", "intermediate_size"))
    if not model.require("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if (factor := model.find("block_ffn_dim_multiplier")) is not None:
        width = int(factor * width)
    multiple = int(model.require("block_multiple_of"))
    return multiple * ((width + multiple - 1) // multiple)


def short_convolution(stored: HFTensor) -> RuleResult:
    if "conv.conv" not in stored.name or len(stored.info.shape) != 3:
        return None
    return (stored.tensor(shape=(stored.info.shape[0], stored.info.shape[-1])),)
