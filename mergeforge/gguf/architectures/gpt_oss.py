"""gpt-oss in 16 bits: stacks of experts stored transposed, gate and up in turn."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import window_notes
from mergeforge.gguf.architectures.hparams import text_keys
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, Answer, Stored, spelled
from mergeforge.gguf.key_values import u32

_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)
_NEEDS = (*ATTENTION, "post_attention_norm|attn_post_norm", "attn_sinks", "ffn_gate_inp")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@architecture("GptOssForCausalLM")
def gpt_oss(model: Model) -> GGUFModelSpec:
    keys = text_keys(model) | {
        "attention.sliding_window": u32(model.need("sliding_window")),
        "expert_feed_forward_length": u32(model.need("intermediate_size")),
    }
    notes = window_notes(model, True, period=2)
    return spelled(model, "gpt-oss", keys, sinks, experts, vocab="gpt2", needs=(*_NEEDS, *_EXPERTS), notes=notes)


def sinks(stored: Stored) -> Answer:
    return (stored.at(stored.gguf(stored.name + ".weight")),) if stored.name.endswith("sinks") else None


def experts(stored: Stored) -> Answer:
    kind = stored.name.rpartition(".experts.")[2]
    if kind == "gate_up_proj":
        count, inputs, outputs = stored.info.shape
        shape = (count, outputs // 2, inputs)
        return (
            stored.in_block("ffn_gate_exps", shape, turn=inputs, columns=_EVEN),
            stored.in_block("ffn_up_exps", shape, turn=inputs, columns=_ODD),
        )
    if kind == "down_proj":
        count, inputs, outputs = stored.info.shape
        return (stored.in_block("ffn_down_exps", (count, outputs, inputs), turn=inputs),)
    return _biases(stored, kind)


def _biases(stored: Stored, kind: str) -> Answer:
    if kind == "gate_up_proj_bias":
        count, outputs = stored.info.shape
        return tuple(
            stored.at(f"blk.{stored.layer}.{part}.bias", (count, outputs // 2), turn=1, columns=columns)
            for part, columns in (("ffn_gate_exps", _EVEN), ("ffn_up_exps", _ODD))
        )
    return (stored.at(f"blk.{stored.layer}.ffn_down_exps.bias"),) if kind == "down_proj_bias" else None
