"""gpt-oss in 16 bits: stacked experts stored transposed, gate and up interleaved."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import sliding_window_warnings
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import u32

_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)
_NEEDS = (*ATTENTION, "post_attention_norm|attn_post_norm", "attn_sinks", "ffn_gate_inp")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@architecture("GptOssForCausalLM")
def gpt_oss(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "attention.sliding_window": u32(model.require("sliding_window")),
        "expert_feed_forward_length": u32(model.require("intermediate_size")),
    }
    notes = sliding_window_warnings(model, True, period=2)
    return make_spec(
        model, "gpt-oss", keys, sinks, experts, vocab="gpt2", required_per_block=(*_NEEDS, *_EXPERTS), notes=notes
    )


def sinks(stored: HFTensor) -> RuleResult:
    return (stored.tensor(stored.gguf_name(stored.name + ".weight")),) if stored.name.endswith("sinks") else None


def experts(stored: HFTensor) -> RuleResult:
    kind = stored.name.rpartition(".experts.")[2]
    if kind == "gate_up_proj":
        count, inputs, outputs = stored.info.shape
        shape = (count, outputs // 2, inputs)
        return (
            stored.block_tensor("ffn_gate_exps", shape, transpose=inputs, columns=_EVEN),
            stored.block_tensor("ffn_up_exps", shape, transpose=inputs, columns=_ODD),
        )
    if kind == "down_proj":
        count, inputs, outputs = stored.info.shape
        return (stored.block_tensor("ffn_down_exps", (count, outputs, inputs), transpose=inputs),)
    return _biases(stored, kind)


def _biases(stored: HFTensor, kind: str) -> RuleResult:
    if kind == "gate_up_proj_bias":
        count, outputs = stored.info.shape
        return tuple(
            stored.tensor(f"blk.{stored.layer}.{part}.bias", (count, outputs // 2), transpose=1, columns=columns)
            for part, columns in (("ffn_gate_exps", _EVEN), ("ffn_up_exps", _ODD))
        )
    return (stored.tensor(f"blk.{stored.layer}.ffn_down_exps.bias"),) if kind == "down_proj_bias" else None
