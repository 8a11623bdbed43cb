"""Qwen3-Next and Qwen 3.5: linear attention in most layers, and layers that predict further tokens (mtp.*)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.qwen import expert_keys
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, Rule, RuleResult, inside_model, make_spec
from mergeforge.gguf.key_values import Value, array, u32

_SECTIONS = (11, 11, 10, 0)  # Qwen3_5RotaryEmbedding's default
_NEEDS = (
    *("attn_norm", "attn_q|attn_qkv", "attn_output|ssm_out", "post_attention_norm"),
    *("ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps"),
)


@architecture("Qwen3NextForCausalLM")
def qwen3next(model: HFModel) -> GGUFModelSpec:
    return _hybrid(model, "qwen3next", {}, interleaved_projections)


@architecture(
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5ForCausalLM",
    "Qwen3_5TextModel",
    "MiniCPMV4_6ForConditionalGeneration",
)
def qwen35(model: HFModel) -> GGUFModelSpec:
    return _hybrid(model, "qwen35", _sections(model) | pooling_keys(model), own_merger, tiled_heads)


@architecture("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM")
def qwen35moe(model: HFModel) -> GGUFModelSpec:
    return _hybrid(model, "qwen35moe", _sections(model), tiled_heads)


def _hybrid(model: HFModel, arch: str, more: dict[str, Value], *rules: Rule) -> GGUFModelSpec:
    extra = prediction_layers(model, "mtp.")
    keys = expert_keys(model) | {"block_count": u32(model.layers + extra.count)}
    keys |= prediction_layer_keys(extra.count) | _linear_attention_keys(model, extra.count) | more
    return make_spec(
        model,
        arch,
        keys,
        extra.rule,
        *rules,
        linear_attention,
        stacked_experts,
        vocab="gpt2",
        required_per_block=_NEEDS,
        layers=model.layers + extra.count,
        rename=lambda name: linear_attention_name(extra.rename(name), model.name.endswith("TextModel")),
        notes=extra.notes,
    )


def _sections(model: HFModel) -> dict[str, Value]:
    return {} if "mrope_section" in model.rope else {"rope.dimension_sections": array("i32", _SECTIONS)}


def _linear_attention_keys(model: HFModel, extra_layers: int) -> dict[str, Value]:
    heads = int(model.require("linear_num_value_heads"))
    keys = {
        "ssm.conv_kernel": u32(model.require("linear_conv_kernel_dim")),
        "ssm.state_size": u32(model.require("linear_key_head_dim")),
        "ssm.group_count": u32(model.require("linear_num_key_heads")),
        "ssm.time_step_rank": u32(heads),
        "ssm.inner_size": u32(int(model.require("linear_value_head_dim")) * heads),
    }
    if kinds := model.find("layer_types"):
        linear = [kind == "linear_attention" for kind in kinds] + [False] * extra_layers
        keys["attention.recurrent_layers"] = array("bool", linear)
    return keys | {
        "full_attention_interval": u32(model.find("full_attention_interval") or 4),
        "rope.dimension_count": u32(int(model.head_dim * model.rope.get("partial_rotary_factor", 0.25))),
    }


def linear_attention_name(name: str, headless: bool = False) -> str:
    name = inside_model(name) if headless else name
    return re.sub(r"\.dt_bias$", ".dt_proj.bias", name)


def linear_attention(stored: HFTensor) -> RuleResult:
    """A_log becomes -exp(A_log), convolutions lose a dimension, and all norms but one are offsets from one."""
    if stored.name.endswith(".A_log"):
        return (stored.tensor(negative_exp=True),)
    if stored.name.endswith(".conv1d.weight"):
        return (stored.tensor(shape=(stored.info.shape[0], stored.info.shape[-1])),)
    shifted = stored.name.endswith("norm.weight") and not stored.name.endswith("linear_attn.norm.weight")
    return (stored.tensor(add=1.0),) if shifted else None


def interleaved_projections(stored: HFTensor) -> RuleResult:
    """Qwen3-Next's in_proj_qkvz: for each key head its q, k, v and gate rows."""
    if not stored.name.endswith("in_proj_qkvz.weight"):
        return None
    groups, repeats, key, value = _head_sizes(stored.model)
    sizes = (key, key, repeats * value, repeats * value)
    stored.rows_per_part(groups)
    *qkv, gate = deinterleave_qkv(stored.info.rows, groups, sizes)
    rows = np.concatenate(qkv)
    return (
        stored.block_tensor("attn_qkv", (len(rows), stored.info.columns), rows=rows),
        stored.block_tensor("attn_gate", (len(gate), stored.info.columns), rows=gate),
    )


def tiled_heads(stored: HFTensor) -> RuleResult:
    """Qwen 3.5's value heads: stored by key head, but llama.cpp wants the first of every key head, then the second.

    ggml repeats key heads as a whole (k0, k1, ..., k0, k1, ...), so value heads must follow the same order.
    """
    groups, repeats, key, value = _head_sizes(stored.model)
    name = stored.name
    if repeats == 1 or "linear_attn." not in name:
        return None
    if name.endswith(".out_proj.weight"):
        return (stored.tensor(column_order=_tiled(groups, repeats, value)),)
    if name.endswith((".in_proj_qkv.weight", ".conv1d.weight")):
        order = _after(2 * groups * key, _tiled(groups, repeats, value))
        shape = (stored.info.shape[0], stored.info.shape[-1])
        return (stored.tensor(shape=shape, rows=order),)
    if name.endswith(".in_proj_z.weight"):
        return (stored.tensor(rows=_tiled(groups, repeats, value)),)
    single = (".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_proj.bias")
    if name.endswith(single):
        return (stored.tensor(rows=_tiled(groups, repeats, 1), negative_exp=name.endswith(".A_log")),)
    return None


def own_merger(stored: HFTensor) -> RuleResult:
    """MiniCPM-V's, between its vision tower and its text part, a Qwen 3.5."""
    return "not part of the text model" if stored.name.startswith("model.merger.") else None


def _head_sizes(model: HFModel) -> tuple[int, int, int, int]:
    """Key heads, value heads for each, and the sizes of a key and of a value head."""
    groups, heads = int(model.require("linear_num_key_heads")), int(model.require("linear_num_value_heads"))
    return (
        groups,
        heads // groups,
        int(model.require("linear_key_head_dim")),
        int(model.require("linear_value_head_dim")),
    )


def _tiled(groups: int, repeats: int, size: int) -> np.ndarray:
    numbers = np.arange(groups * repeats * size, dtype=np.int64)
    return numbers.reshape(groups, repeats, size).swapaxes(0, 1).reshape(-1)


def _after(first: int, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """The order of all rows, of which the first ones stay."""
    return np.concatenate([np.arange(first, dtype=np.int64), np.asarray(order) + first])
