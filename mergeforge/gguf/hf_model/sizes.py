"""Rules for sizes and switches of a config that no key is equal to."""

from __future__ import annotations

from typing import Any

from mergeforge.gguf.hf_model.classes import HFClass
from mergeforge.gguf.hf_model.keys import ModelKeys

_GATING = {1: "softmax", 2: "sigmoid", 4: "sqrtsoftplus"}
_GATING_NAMES = ("scoring_func", "score_function", "score_func", "moe_router_activation_func")


def vocabulary(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """The rows of the embeddings."""
    if rows := keys.shapes.get("token_embd.weight"):
        part["vocab_size"] = rows[0]
    if "type_vocab_size" in part and (types := keys.shapes.get("token_types.weight")):
        part["type_vocab_size"] = types[0] if len(types) > 1 else 1


def positions(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """A table of positions has a row for each; RoBERTa's has one more than the padding token's id in front."""
    table = keys.shapes.get("position_embd.weight")
    if entry.name.startswith(("Roberta", "XLMRoberta")) and (context := keys.get("context_length")):
        padding = keys.get("tokenizer.ggml.padding_token_id")
        part["pad_token_id"] = 1 if padding is None else padding
        part["max_position_embeddings"] = context + 1 + part["pad_token_id"]
    elif table:
        part |= {name: table[0] for name in ("n_positions", "n_ctx", "max_position_embeddings") if name in part}


def heads(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Key-value heads: of latent attention, llama.cpp's key is 1; a list differs between layers."""
    count, name = keys.get("attention.head_count_kv"), "num_key_value_heads"
    if keys.get("attention.key_length_mla") is not None or "blk.0.attn_k_b.weight" in keys.shapes:
        part[name] = keys.get("attention.head_count")
    elif isinstance(count, list) and name in entry.config:
        part[name] = max(count, default=0)
    elif isinstance(count, int) and name in part and not entry.states(name):
        part[name] = count


def head_size(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """The size of a head, where no key is equal to it."""
    count, query = keys.get("attention.head_count"), keys.shapes.get("blk.0.attn_q.weight")
    if "head_dim" not in part or entry.states("head_dim") or not isinstance(count, int) or not count:
        return
    size = (
        keys.get("attention.key_length")
        or (query and query[0] // count)
        or (keys.get("embedding_length") or 0) // count
    )
    part["head_dim"] = size


def engine_facts(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """What llama.cpp computes whatever the file says."""
    if entry.arch in ("qwen3moe", "qwen3vlmoe", "qwen3next", "qwen35moe") and "norm_topk_prob" in part:
        part["norm_topk_prob"] = True
    if "query_pre_attn_scalar" in part and (size := keys.get("attention.key_length")):
        hidden, count = keys.get("embedding_length"), keys.get("attention.head_count")
        large = keys.get("block_count") == {"gemma2": 46, "gemma3": 62}.get(entry.arch)
        part["query_pre_attn_scalar"] = hidden // count if large else size
    if part.get("sliding_window") == 0:
        part["sliding_window"] = None


def per_layer_embedding(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Gemma 3n and 4: sizes that only tensors show."""
    if table := keys.shapes.get("per_layer_token_embd.weight"):
        part["vocab_size_per_layer_input"] = table[0]
    if "laurel_rank" in part and (laurel := keys.shapes.get("blk.0.laurel_l.weight")):
        part["laurel_rank"] = laurel[0]


def latent_attention(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """A head of latent attention has a rotated part and another one; the key is the sum."""
    length, rotated = keys.get("attention.key_length_mla"), keys.get("rope.dimension_count")
    length = length or keys.get("attention.key_length")
    if "qk_nope_head_dim" in entry.config and length and rotated:
        part["qk_rope_head_dim"] = rotated
        part["qk_nope_head_dim"] = length - rotated
    if "qk_head_dim" in entry.config and length:
        part["qk_head_dim"] = length
    if "head_dim" in part and "qk_rope_head_dim" in part:
        part["head_dim"] = part["qk_rope_head_dim"]


def expert_selection(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """How experts are chosen and weighted."""
    gating = _GATING.get(keys.get("expert_gating_func") or 0)
    if gating and (entry.arch == "deepseek2" or any(name in part for name in _GATING_NAMES)):
        part[next((name for name in _GATING_NAMES if name in part), "scoring_func")] = gating
    if "moe_primary_router_apply_softmax" in part and gating:
        part["moe_primary_router_apply_softmax"] = gating == "softmax"
    if "norm_topk_prob" in part and entry.arch in ("deepseek2", "glm-dsa"):
        part["norm_topk_prob"] = bool(keys.get("expert_weights_norm"))


def state_space(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Mamba: the inner size as a multiple of the hidden size; heads of Mamba 2."""
    inner, hidden, rank = keys.get("ssm.inner_size"), keys.get("embedding_length"), keys.get("ssm.time_step_rank")
    if not inner or not hidden:
        return
    for name in ("mamba_expand", "expand"):
        if name in part:
            part[name] = inner // hidden
    if "intermediate_size" in part and entry.arch == "mamba":
        part["intermediate_size"] = inner
    if "hidden_size" in part:
        part["hidden_size"] = hidden
    if rank and entry.arch in ("mamba2", "falcon-h1", "granitehybrid"):
        for name, value in (("num_heads", rank), ("head_dim", inner // rank), ("mamba_n_heads", rank)):
            if name in part and (name != "head_dim" or entry.arch == "mamba2"):
                part[name] = value
        if "mamba_d_head" in part:
            part["mamba_d_head"] = inner // rank
    if "linear_value_head_dim" in part and rank:
        part["linear_value_head_dim"] = inner // rank


def scales(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """MiniCPM's factors, which GGUF has as products with sizes."""
    layers, residual, logits = (keys.get(name) for name in ("block_count", "residual_scale", "logit_scale"))
    if "scale_depth" in part and residual and layers:
        part["scale_depth"] = _rounded(residual * layers**0.5)
    if "dim_model_base" in part and logits and (hidden := keys.get("embedding_length")):
        part["dim_model_base"] = round(hidden / logits)


def widths(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Feed-forward widths under other names, or as a multiple."""
    width = keys.get("feed_forward_length")
    if entry.name.startswith("DistilBert") and width:
        part["hidden_dim"] = width
    if entry.arch == "neo-bert" and width:
        part["intermediate_size"] = -(-3 * width // 2)
    if "block_auto_adjust_ff_dim" in part and width:
        part |= {"block_auto_adjust_ff_dim": False, "intermediate_size": width}
        part.pop("block_ff_dim", None)
    if entry.arch == "ernie4_5-moe" and (shared := keys.get("expert_shared_feed_forward_length")):
        part.setdefault("intermediate_size", shared * part["num_key_value_heads"])


def widths_of_layers(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """OpenELM: widths as multiples of the hidden size."""
    sizes, hidden = keys.get("feed_forward_length"), keys.get("embedding_length")
    if entry.arch == "openelm" and isinstance(sizes, list) and hidden:
        part["ffn_multipliers"] = [size / hidden for size in sizes]


def folded_multipliers(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Falcon-H1's multipliers, which are folded into the weights of a GGUF file."""
    if entry.arch == "falcon-h1":
        part |= {name: 1.0 for name in entry.config if name.endswith("_multiplier")}
        part |= {"mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5}


def pooling(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """How a classifier pools, and activations that are stored by name."""
    names = {1: "mean", 2: "cls"}
    if kind := names.get(keys.get("classifier.pooling_type") or 0):
        part["classifier_pooling"] = kind
    for name in ("classifier_activation", "hidden_activation"):
        if (value := keys.get(name.replace("classifier_", "classifier."))) is not None:
            part[name] = value


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


SIZE_RULES = (
    vocabulary,
    positions,
    heads,
    head_size,
    latent_attention,
    expert_selection,
    state_space,
    scales,
    widths,
    widths_of_layers,
    folded_multipliers,
    pooling,
    per_layer_embedding,
    engine_facts,
)
