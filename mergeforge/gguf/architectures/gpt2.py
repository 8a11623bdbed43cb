"""GPT-2, ruGPT-3 XL and StarCoder 1: weights stored as (in, out) in GPT-2, learned positions."""

from __future__ import annotations

import re

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import DECODER, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import f32, u32

_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".c_fc2.weight")
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


@architecture("RuGPT3XLForCausalLM")
def rugpt3(model: HFModel) -> GGUFModelSpec:
    """A GPT-2 whose projections of queries, keys and values are stored apart."""
    return make_spec(
        model, "gpt2", hparams(model), _joined_projections, vocab="gpt2", required_per_block=DECODER, required=_ONCE
    )


def _joined_projections(stored: HFTensor) -> RuleResult:
    found = re.search(r"\.self_attn\.([qkv])_proj\.(weight|bias)$", stored.name)
    if not found:
        return None
    rows = stored.info.shape[0]
    first, shape = "qkv".index(found[1]) * rows, (3 * rows, *stored.info.shape[1:])
    start = {"first_column": first} if stored.is_bias else {"first_row": first}
    return (stored.block_tensor("attn_qkv", shape, **start),)


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
