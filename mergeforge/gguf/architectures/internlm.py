"""InternLM 2 and 3, Baichuan: q, k and v in one tensor (2, Baichuan), rotated heads paired."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import paired_heads
from mergeforge.gguf.architectures.hparams import text_keys
from mergeforge.gguf.architectures.llama import llama_keys
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.row_order import grouped, paired
from mergeforge.gguf.architectures.tensor_mapping import Answer, Stored, spelled
from mergeforge.gguf.key_values import string, u32

_BAICHUAN_2_SIZE = 125696


@architecture("InternLM2ForCausalLM")
def internlm2(model: Model) -> GGUFModelSpec:
    return spelled(model, "internlm2", text_keys(model), grouped_heads, vocab="internlm2")


@architecture("InternLM3ForCausalLM")
def internlm3(model: Model) -> GGUFModelSpec:
    return spelled(model, "llama", llama_keys(model), paired_heads, vocab="internlm3")


@architecture("BaichuanForCausalLM", "BaiChuanForCausalLM")
def baichuan(model: Model) -> GGUFModelSpec:
    """The converter of b11549 calls itself without end on every tensor but W_pack."""
    keys = text_keys(model) | {
        "tensor_data_layout": string("Meta AI original pth"),
        "rope.dimension_count": u32(model.hidden // model.heads),
    }
    second = model.find("vocab_size") == _BAICHUAN_2_SIZE
    notes = ["Baichuan 2 normalises the rows of lm_head before it uses them, llama.cpp does not"] if second else ()
    return spelled(model, "baichuan", keys, packed_heads, vocab="spm", notes=notes)


def grouped_heads(stored: Stored) -> Answer:
    """wqkv: the queries of a group, then its key and value."""
    if ".attention.wqkv" not in stored.name:
        return None
    heads, groups = stored.model.heads, stored.model.kv_heads
    size = stored.split_rows(heads + 2 * groups)
    query, key, value = grouped(stored.info.rows, groups, (heads // groups * size, size, size))
    columns = stored.info.shape[1:]
    return (
        stored.in_block("attn_q", (len(query), *columns), rows=query[paired(len(query), heads)]),
        stored.in_block("attn_k", (len(key), *columns), rows=key[paired(len(key), groups)]),
        stored.in_block("attn_v", (len(value), *columns), rows=value),
    )


def packed_heads(stored: Stored) -> Answer:
    """W_pack: all queries, all keys, all values."""
    if not stored.name.endswith("W_pack.weight"):
        return None
    rows = stored.split_rows(3)
    query, key, value = grouped(stored.info.rows, 1, (rows, rows, rows))
    order = paired(rows, stored.model.heads)
    shape = (rows, stored.info.columns)
    return (
        stored.in_block("attn_q", shape, rows=query[order]),
        stored.in_block("attn_k", shape, rows=key[order]),
        stored.in_block("attn_v", shape, rows=value),
    )
