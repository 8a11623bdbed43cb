"""DeciLM and NVIDIA's Nemotrons pruned from Llama: the number of heads and the width differ by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import KEY, QUERY
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import interleave_rope_halves
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32

_LLAMA3_VOCAB = 128256
_MULTIPLE = 256  # of a feed-forward's width


@dataclass(frozen=True)
class Heads:
    """Of each layer: heads, key-value heads."""

    query: Sequence[int]
    key: Sequence[int]


@architecture("DeciLMForCausalLM")
def deci(model: HFModel) -> GGUFModelSpec:
    blocks = model.find("block_configs")
    heads = _block_heads(model, blocks) if blocks else _listed_heads(model)
    keys = _block_keys(model, heads, blocks) if blocks else _listed_keys(model, heads)
    keys |= {"vocab_size": u32(model.require("vocab_size")), "rope.dimension_count": u32(model.head_dim)}
    return make_spec(
        model,
        "deci",
        keys,
        permuted(heads),
        vocab="gpt2" if model.require("vocab_size") == _LLAMA3_VOCAB else "spm_or_gpt2",
        required_per_block=(),
        constants=rope_freq_factors_llama3(model),
    )


def _listed_heads(model: HFModel) -> Heads:
    return Heads(
        [model.heads] * model.layers, model.find("num_key_value_heads_per_layer") or [model.kv_heads] * model.layers
    )


def _block_heads(model: HFModel, blocks: Sequence[Mapping[str, Any]]) -> Heads:
    """A layer may have no attention (no heads), or a linear map instead (no key-value heads)."""
    query, key = [], []
    for attention in (block["attention"] for block in blocks):
        group = attention["n_heads_in_group"]
        query.append(model.heads if group or attention["replace_with_linear"] else 0)
        key.append(model.heads // group if group else 0)
    return Heads(query, key)


def _listed_keys(model: HFModel, heads: Heads) -> dict[str, Value]:
    if model.find("num_key_value_heads_per_layer") is None:
        return hparams(model)
    return hparams(model) | {"attention.head_count_kv": array("i32", heads.key)}


def _block_keys(model: HFModel, heads: Heads, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    widths = [_width(block["ffn"]["ffn_mult"] or 0.0, model.hidden) for block in blocks]
    return {
        **optional(f32, rope__freq_base=model.rope.get("rope_theta")),
        "attention.head_count_kv": array("i32", heads.key),
        "attention.head_count": array("i32", heads.query),
        "feed_forward_length": array("i32", widths),
        "block_count": u32(model.layers),
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "attention.layer_norm_rms_epsilon": f32(model.require("rms_norm_eps")),
        **head_sizes(model.hidden // model.heads),
        **FILE_TYPE,
    }


def _width(multiplier: float, hidden: int) -> int:
    return -(int(2 * multiplier * hidden / 3) // -_MULTIPLE) * _MULTIPLE


def permuted(heads: Heads) -> Callable[[HFTensor], RuleResult]:
    """A rule for queries and keys, whose rope llama.cpp computes on adjacent rows."""

    def rule(stored: HFTensor) -> RuleResult:
        if not stored.name.endswith((*QUERY, *KEY)):
            return None
        count = (heads.query if stored.name.endswith(QUERY) else heads.key)[stored.layer]
        stored.rows_per_part(2 * count)
        return (stored.tensor(rows=interleave_rope_halves(stored.info.rows, count)),)

    return rule
