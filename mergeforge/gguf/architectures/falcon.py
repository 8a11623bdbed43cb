"""Falcon: groups of queries, each followed by its key and value."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import f32, string, u32

_CONTEXT = 2048  # as in the converter, whatever the config says
_NEEDS = ("attn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down")


@architecture("FalconForCausalLM", "RWForCausalLM")
def falcon(model: HFModel) -> GGUFModelSpec:
    if model.find("alibi"):
        raise SourceError("config.json: llama.cpp's falcon has no ALiBi ('alibi': true)", hint="write safetensors")
    keys = {
        "context_length": u32(_CONTEXT),
        "tensor_data_layout": string("jploski"),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.find("ffn_hidden_size") or 4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(_kv_heads(model)),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(model, "falcon", keys, query_key_value, vocab="gpt2", required_per_block=_NEEDS)


def _kv_heads(model: HFModel) -> int:
    """1 for multi-query models (7B), for which transformers sets num_kv_heads to the number of heads.

    The converter uses that value and fails on these models.
    """
    if model.find("multi_query") and not model.find("new_decoder_architecture"):
        return 1
    return int(model.find("num_kv_heads", "n_head_kv") or 1)


def query_key_value(stored: HFTensor) -> RuleResult:
    if "query_key_value" not in stored.name:
        return None
    import numpy as np

    heads, groups = stored.model.heads, _kv_heads(stored.model)
    size = stored.rows_per_part(heads + 2 * groups)
    parts = deinterleave_qkv(stored.info.rows, groups, (heads // groups * size, size, size))
    return (stored.tensor(rows=np.concatenate(parts)),)
