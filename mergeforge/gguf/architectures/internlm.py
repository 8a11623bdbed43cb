"""InternLM 2 and 3, Baichuan: q, k and v in one tensor (InternLM 2, Baichuan), rope halves interleaved."""

from __future__ import annotations

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.llama import llama_keys
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import deinterleave_qkv, interleave_rope_halves
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import string, u32

_BAICHUAN_2_SIZE = 125696


@architecture("InternLM2ForCausalLM")
def internlm2(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "internlm2", hparams(model), deinterleaved_heads, vocab="internlm2")


@architecture("InternLM3ForCausalLM")
def internlm3(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "llama", llama_keys(model), permute_rope_heads, vocab="internlm3")


@architecture("BaichuanForCausalLM", "BaiChuanForCausalLM")
def baichuan(model: HFModel) -> GGUFModelSpec:
    """The converter of b11549 recurses endlessly on every tensor except W_pack."""
    keys = hparams(model) | {
        "tensor_data_layout": string("Meta AI original pth"),
        "rope.dimension_count": u32(model.hidden // model.heads),
    }
    second = model.find("vocab_size") == _BAICHUAN_2_SIZE
    notes = (
        [WarningText("Baichuan 2 normalizes the rows of lm_head before use, but llama.cpp does not")] if second else ()
    )
    return make_spec(model, "baichuan", keys, split_packed_heads, vocab="spm", notes=notes)


def deinterleaved_heads(stored: HFTensor) -> RuleResult:
    """wqkv: the queries of a group, then its key and value."""
    if ".attention.wqkv" not in stored.name:
        return None
    heads, groups = stored.model.heads, stored.model.kv_heads
    size = stored.rows_per_part(heads + 2 * groups)
    query, key, value = deinterleave_qkv(stored.info.rows, groups, (heads // groups * size, size, size))
    columns = stored.info.shape[1:]
    return (
        stored.block_tensor("attn_q", (len(query), *columns), rows=query[interleave_rope_halves(len(query), heads)]),
        stored.block_tensor("attn_k", (len(key), *columns), rows=key[interleave_rope_halves(len(key), groups)]),
        stored.block_tensor("attn_v", (len(value), *columns), rows=value),
    )


def split_packed_heads(stored: HFTensor) -> RuleResult:
    """W_pack: all queries, all keys, all values."""
    if not stored.name.endswith("W_pack.weight"):
        return None
    rows = stored.rows_per_part(3)
    query, key, value = deinterleave_qkv(stored.info.rows, 1, (rows, rows, rows))
    order = interleave_rope_halves(rows, stored.model.heads)
    shape = (rows, stored.info.columns)
    return (
        stored.block_tensor("attn_q", shape, rows=query[order]),
        stored.block_tensor("attn_k", shape, rows=key[order]),
        stored.block_tensor("attn_v", shape, rows=value),
    )
