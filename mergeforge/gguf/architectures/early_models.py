"""Decoders of 2022 to 2024 with names and keys of their own: BLOOM, MPT, DBRX, CodeShell, Refact, Orion, OpenELM, PLM,
Pangu, Maincoder, Jais 2."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget, architecture
from mergeforge.gguf.architectures.deepseek import tied_head
from mergeforge.gguf.architectures.gptneox import query_key_value
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, DECODER, GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, f32, string, u32

_META = {"tensor_data_layout": string("Meta AI original pth")}


@architecture("BloomForCausalLM", "BloomModel")
def bloom(model: HFModel) -> GGUFModelSpec:
    hidden = int(model.require("hidden_size", "n_embed"))
    keys = {
        "context_length": u32(model.find("seq_length") or hidden),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(4 * hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.heads),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(
        model,
        "bloom",
        keys,
        query_key_value,
        vocab="gpt2",
        required_per_block=DECODER,
        rename=lambda name: name.replace("transformer.", ""),
    )


@architecture("MPTForCausalLM", "MptForCausalLM")
def mpt(model: HFModel) -> GGUFModelSpec:
    """The converter writes no general.file_type. transformers calls the class Mpt."""
    attention, hidden = model.require("attn_config"), int(model.require("d_model"))
    keys = {
        "context_length": u32(model.require("max_seq_len")),
        "embedding_length": u32(hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(4 * hidden),
        "attention.head_count": u32(model.heads),
    }
    if attention.get("kv_n_heads"):
        keys["attention.head_count_kv"] = u32(attention["kv_n_heads"])
    keys["attention.layer_norm_epsilon"] = f32(1e-5)
    if attention.get("clip_qkv") is not None:
        keys["attention.clamp_kqv"] = f32(attention["clip_qkv"])
    bias = attention.get("alibi_bias_max", 8) if attention.get("alibi") else 0.0
    keys["attention.max_alibi_bias"] = f32(bias)
    return make_spec(
        model, "mpt", keys, vocab="gpt2", required_per_block=DECODER, required=("token_embd", "output_norm")
    )


@architecture("DbrxForCausalLM")
def dbrx(model: HFModel) -> GGUFModelSpec:
    experts, attention = model.require("ffn_config"), model.require("attn_config")
    keys = {
        "block_count": u32(model.layers),
        "context_length": u32(model.require("max_seq_len")),
        "embedding_length": u32(model.require("d_model")),
        "feed_forward_length": u32(experts["ffn_hidden_size"]),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(attention["kv_n_heads"]),
        "rope.freq_base": f32(attention["rope_theta"]),
        "attention.clamp_kqv": f32(attention["clip_qkv"]),
        "expert_count": u32(experts["moe_num_experts"]),
        "expert_used_count": u32(experts["moe_top_k"]),
        "attention.layer_norm_epsilon": f32(1e-5),
        **FILE_TYPE,
    }
    needs = ("attn_norm", "attn_qkv", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    return make_spec(model, "dbrx", keys, flat_experts, vocab="gpt2", required_per_block=needs)


def flat_experts(stored: HFTensor) -> RuleResult:
    """All experts of a layer in one matrix, (experts x width) x hidden; in w2 each expert is transposed."""
    found = re.search(r"ffn\.experts\.mlp\.(w1|w2|v1)$", stored.name)
    if not found:
        router = stored.name.endswith("ffn.router.layer.weight")  # not kept in F32, unlike in other families
        return (TensorTarget(stored.gguf_name(), stored.info.shape),) if router else None
    count = int(stored.model.require("ffn_config")["moe_num_experts"])
    width, hidden = stored.rows_per_part(count), stored.info.columns
    part = {"w1": "gate", "w2": "down", "v1": "up"}[found[1]]
    name = f"blk.{stored.layer}.ffn_{part}_exps.weight"
    if found[1] == "w2":
        return (stored.tensor(name, (count, hidden, width), transpose=width),)
    return (stored.tensor(name, (count, width, hidden)),)


@architecture("CodeShellForCausalLM")
def codeshell(model: HFModel) -> GGUFModelSpec:
    keys = {
        "context_length": u32(model.require("n_positions")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(4 * model.hidden),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.require("num_query_groups")),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
        "rope.freq_base": f32(10000.0),
        "rope.scaling.type": string("linear"),
        "rope.scaling.factor": f32(1.0),
    }
    return make_spec(model, "codeshell", keys, vocab="gpt2", required_per_block=DECODER)


@architecture("GPTRefactForCausalLM")
def refact(model: HFModel) -> GGUFModelSpec:
    keys = {
        "context_length": u32(model.require("n_positions")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(_refact_width(model)),
        "block_count": u32(model.layers),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(1),
        "attention.layer_norm_rms_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(model, "refact", keys, shared_key_value, vocab="gpt2")


def _refact_width(model: HFModel) -> int:
    width = int(2 * 4 * model.hidden / 3)
    return 256 * ((width + 255) // 256)


def shared_key_value(stored: HFTensor) -> RuleResult:
    """kv: the rows of one key and one value head; gate_up_proj: those of both."""
    if stored.name.endswith(".attn.q.weight"):
        return (stored.block_tensor("attn_q"),)
    if stored.name.endswith(".attn.kv.weight"):
        return split_rows(stored, ("attn_k", "attn_v"))
    return split_rows(stored, ("ffn_gate", "ffn_up")) if stored.name.endswith(".mlp.gate_up_proj.weight") else None


def split_rows(stored: HFTensor, parts: Sequence[str]) -> RuleResult:
    """A target for each of equal parts."""
    size = stored.rows_per_part(len(parts))
    rows = deinterleave_qkv(stored.info.rows, 1, (size,) * len(parts))
    return tuple(
        stored.block_tensor(part, (size, stored.info.columns), rows=some)
        for part, some in zip(parts, rows, strict=True)
    )


@architecture("OrionForCausalLM")
def orion(model: HFModel) -> GGUFModelSpec:
    """rms_norm_eps is the epsilon of layer norms."""
    keys = {
        **FILE_TYPE,
        **_META,
        "context_length": u32(model.require("max_sequence_length", "max_position_embeddings", "model_max_length")),
        **_llama_sizes(model),
        "attention.layer_norm_epsilon": f32(model.require("rms_norm_eps")),
    }
    return make_spec(model, "orion", keys, vocab="spm")


def _llama_sizes(model: HFModel) -> dict[str, Value]:
    return {
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
    }


@architecture("OpenELMForCausalLM")
def openelm(model: HFModel) -> GGUFModelSpec:
    """Heads and widths differ between layers."""
    model = HFModel(
        model.name,
        model.original_config,
        {**model.config, "num_hidden_layers": model.require("num_transformer_layers")},
        model.tensors,
    )
    hidden, size = int(model.require("model_dim")), int(model.require("head_dim"))
    divisor = int(model.require("ffn_dim_divisor"))
    widths = [_divisible(factor * hidden, divisor) for factor in model.require("ffn_multipliers")]
    keys = {
        "block_count": u32(model.layers),
        "context_length": u32(model.require("max_context_length")),
        "embedding_length": u32(hidden),
        "feed_forward_length": array("i32", widths),
        "attention.head_count": array("i32", model.require("num_query_heads")),
        "attention.head_count_kv": array("i32", model.require("num_kv_heads")),
        "rope.freq_base": f32(model.require("rope_freq_constant")),
        "attention.layer_norm_rms_epsilon": f32(1e-6),
        "rope.dimension_count": u32(size),
        **head_sizes(size),
        **FILE_TYPE,
    }

    def halves(stored: HFTensor) -> RuleResult:
        return split_rows(stored, ("ffn_gate", "ffn_up")) if stored.name.endswith(".ffn.proj_1.weight") else None

    return make_spec(model, "openelm", keys, halves, vocab="spm", required_per_block=(*DECODER, "ffn_gate"))


def _divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to a width, but not below nine tenths of it (OpenELM's make_divisible)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@architecture("PLMForCausalLM")
def plm(model: HFModel) -> GGUFModelSpec:
    rotated = int(model.require("qk_rope_head_dim"))
    keys = hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "attention.kv_lora_rank": u32(model.require("kv_lora_rank")),
        "attention.key_length": u32(int(model.require("qk_nope_head_dim")) + rotated),
        "attention.value_length": u32(model.require("v_head_dim")),
        "rope.dimension_count": u32(rotated),
    }
    needs = ("attn_norm", "attn_q", "attn_kv_a_mqa", "attn_kv_b", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    return make_spec(model, "plm", keys, vocab="gpt2", required_per_block=needs)


@architecture("PanguEmbeddedForCausalLM")
def pangu(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "rope.dimension_count": u32(model.head_dim),
    }
    if model.find("head_dim") is None:
        keys |= head_sizes(model.head_dim)
    return make_spec(model, "pangu-embedded", keys, tied_head, vocab="spm_with_prefix")


@architecture("MaincoderForCausalLM")
def maincoder(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model)
    if (size := model.find("head_dim")) is not None:
        keys["rope.dimension_count"] = u32(size)
    return make_spec(model, "maincoder", keys, vocab="gpt2", required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"))


@architecture("Jais2ForCausalLM")
def jais2(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"rope.dimension_count": u32(model.head_dim)}
    return make_spec(model, "jais2", keys, vocab="gpt2", required_per_block=(*ATTENTION, *DECODER[len(ATTENTION) :]))
