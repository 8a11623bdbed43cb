"""GPT-2 and StarCoder 1: weights stored as (in, out) in GPT-2, learned positions."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import DECODER, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import f32, u32

_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_ONCE = ("token_embd", "position_embd", "output_norm")


@architecture("GPT2LMHeadModel")
def gpt2(model: HFModel) -> GGUFModelSpec:
    keys = {
        "block_count": u32(model.layers),
        "context_length": u32(model.require("n_ctx", "n_positions")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("n_inner") or 4 * model.hidden),
        "attention.head_count": u32(model.heads),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(model, "gpt2", keys, transposed, vocab="gpt2", required_per_block=DECODER, required=_ONCE)


@architecture("GPTBigCodeForCausalLM")
def starcoder(model: HFModel) -> GGUFModelSpec:
    keys = {
        "context_length": u32(model.require("n_positions")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("n_inner") or 4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(1),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(model, "starcoder", keys, vocab="gpt2", required_per_block=DECODER, required=_ONCE)


def transposed(stored: HFTensor) -> RuleResult:
    """Conv1D weights, stored as (in, out)."""
    if not stored.name.endswith(_TRANSPOSED):
        return None
    inputs, outputs = stored.info.shape
    return (stored.tensor(shape=(outputs, inputs), transpose=inputs),)
