"""Rules for the number of layers, and for what differs between them."""

from __future__ import annotations

from typing import Any

from mergeforge.gguf.hf_model.classes import HFClass
from mergeforge.gguf.hf_model.keys import ModelKeys

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_PREDICTED = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
# arch -> what layer_types calls layers with and without key-value heads
_BY_HEADS = {
    "lfm2": ("full_attention", "conv"),
    "lfm2moe": ("full_attention", "conv"),
    "granitehybrid": ("attention", "mamba"),
}


def layer_count(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Blocks that predict further tokens are no layers."""
    blocks, predicted = keys.get("block_count"), keys.get("nextn_predict_layers") or 0
    if blocks is None:
        return
    names = [name for name in _COUNTS if name in part] or ["num_hidden_layers"]
    part |= dict.fromkeys(names, blocks - predicted)
    for name in _PREDICTED:
        if name in part or name in entry.config:
            part[name] = predicted


def layer_types(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """layer_types, where a list in the file says what each layer does."""
    slides, recurrent = keys.get("attention.sliding_window_pattern"), keys.get("attention.recurrent_layers")
    groups = keys.get("attention.head_count_kv")
    layers = (keys.get("block_count") or 0) - (keys.get("nextn_predict_layers") or 0)
    if isinstance(slides, list):
        part["layer_types"] = [("full_attention", "sliding_attention")[on] for on in slides]
    elif isinstance(recurrent, list):
        part["layer_types"] = [("full_attention", "linear_attention")[on] for on in recurrent[:layers]]
    elif entry.arch in _BY_HEADS and isinstance(groups, list):
        with_heads, without = _BY_HEADS[entry.arch]
        part["layer_types"] = [with_heads if count else without for count in groups]
        if entry.name.startswith("Bamba"):
            part.pop("layer_types")
            part["attn_layer_indices"] = [at for at, count in enumerate(groups) if count]


def attention_period(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Jamba: attention and experts in every nth layer."""
    groups = keys.get("attention.head_count_kv")
    if "attn_layer_period" not in part or not isinstance(groups, list) or entry.arch != "jamba":
        return
    offset, period = _period([at for at, count in enumerate(groups) if count], len(groups))
    part |= {"attn_layer_offset": offset, "attn_layer_period": period, "num_key_value_heads": max(groups)}
    experts = [at for at in range(len(groups)) if f"blk.{at}.ffn_gate_exps.weight" in keys.shapes]
    offset, period = _period(experts, len(groups))
    part |= {"expert_layer_offset": offset, "expert_layer_period": period}


def _period(layers: list[int], count: int) -> tuple[int, int]:
    """The first of some layers, and how many there are to the next."""
    if not layers:
        return count, count + 1
    return layers[0], layers[1] - layers[0] if len(layers) > 1 else max(count, layers[0] + 1)


def indexer(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """GLM-5: layers that select tokens, and those that share the selection."""
    kinds = keys.get("attention.indexer.types")
    if isinstance(kinds, list):
        part["indexer_types"] = [("shared", "full")[on] for on in kinds]


def attention_by_layer(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Gemma 4: layers with full attention have heads of another size and number."""
    slides = keys.get("attention.sliding_window_pattern")
    if entry.arch != "gemma4" or not isinstance(slides, list):
        return
    size, sliding_size = keys.get("attention.key_length"), keys.get("attention.key_length_swa")
    groups, widths = keys.get("attention.head_count_kv"), keys.get("feed_forward_length")
    own: dict[str, Any] = {"head_dim": size} if size != sliding_size else {}
    part["head_dim"] = sliding_size
    if isinstance(groups, list):
        part["num_key_value_heads"] = next((count for count, on in zip(groups, slides, strict=False) if on), groups[0])
        own["num_key_value_heads"] = next((n for n, on in zip(groups, slides, strict=False) if not on), groups[0])
    if isinstance(widths, list):
        part |= {"use_double_wide_mlp": len(set(widths)) > 1, "intermediate_size": min(widths)}
    if own:
        part["per_layer_config"] = {str(at): dict(own) for at, on in enumerate(slides) if not on}


def sparsity(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Gemma 3n: the part of activations below a number of standard deviations."""
    scales = keys.get("activation_sparsity_scale")
    if isinstance(scales, list):
        import math

        part["activation_sparsity_pattern"] = [
            0.0 if scale in (float("-inf"), 0.0) and scale < 0 else round((math.erf(scale / math.sqrt(2)) + 1) / 2, 6)
            for scale in scales
        ]


def sliding_layout(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """SmallThinker: llama.cpp has full attention in the first of every four layers."""
    if entry.arch == "smallthinker" and keys.get("attention.sliding_window"):
        part["sliding_window_layout"] = [int(at % 4 != 0) for at in range(keys.get("block_count") or 0)]


def experts_by_layer(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Hunyuan: sizes of experts as lists."""
    layers, width = keys.get("block_count") or 0, keys.get("expert_feed_forward_length")
    if entry.arch != "hunyuan-moe" or not width:
        return
    part |= {"moe_intermediate_size": [width] * layers, "moe_topk": [keys.get("expert_used_count")] * layers}
    part["num_shared_expert"] = [keys.get("expert_shared_count") or 0] * layers


def dense_layers(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """exaone-moe and others keep the number of leading layers without experts under two names."""
    dense = keys.get("leading_dense_block_count")
    if dense is not None and "first_last_k_dense_replace" in part:
        part["first_last_k_dense_replace"] = dense


LAYER_RULES = (
    layer_count,
    layer_types,
    attention_period,
    indexer,
    attention_by_layer,
    sparsity,
    sliding_layout,
    experts_by_layer,
    dense_layers,
)
