"""ERNIE 4.5, dense and with experts; PaddleOCR-VL's text part."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import gate_up_halves, stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, u32

_PREDICTION = ("mtp_block", "mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj")


@architecture("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
def ernie(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "ernie4_5", hparams(model), fused_projections, vocab="spm_with_prefix", rename=_name)


@architecture("PaddleOCRVLForConditionalGeneration")
def paddleocr(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "paddleocr", hparams(model), fused_projections, vocab="spm_with_prefix", rename=_name)


@architecture("Ernie4_5_MoeForCausalLM")
def ernie_moe(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | _expert_keys(model)
    return make_spec(
        model,
        "ernie4_5-moe",
        keys,
        prediction,
        stacked_experts,
        vocab="spm_with_prefix",
        stacked_order=("gate", "up", "down"),
    )


def _expert_keys(model: HFModel) -> dict[str, Value]:
    keys = {
        "expert_count": u32(model.require("moe_num_experts")),
        "expert_used_count": u32(model.require("moe_k")),
        "interleave_moe_layer_step": u32(model.require("moe_layer_interval")),
        "leading_dense_block_count": u32(model.require("moe_layer_start_index")),
    }
    shared = model.find("moe_num_shared_experts")
    keys |= optional(u32, expert_feed_forward_length=model.find("moe_intermediate_size"), expert_shared_count=shared)
    if shared:  # divided by the number of key-value heads, as in the converter
        size = int(model.require("intermediate_size")) // int(model.require("num_key_value_heads"))
        keys["expert_shared_feed_forward_length"] = u32(size)
    return keys


def _name(name: str) -> str:
    return name.replace("ernie.", "model.")


def fused_projections(stored: HFTensor) -> RuleResult:
    """qkv_proj and up_gate_proj (gate first) of Paddle's checkpoints."""
    if stored.name.endswith("up_gate_proj.weight"):
        return gate_up_halves(stored)
    if not stored.name.endswith("qkv_proj.weight"):
        return None
    heads, groups = stored.model.heads, stored.model.kv_heads
    size = stored.rows_per_part(heads + 2 * groups)
    parts = deinterleave_qkv(stored.info.rows, 1, (heads * size, groups * size, groups * size))
    return tuple(
        stored.block_tensor(f"attn_{part}", (len(rows), stored.info.columns), rows=rows)
        for part, rows in zip("qkv", parts, strict=True)
    )


def prediction(stored: HFTensor) -> RuleResult:
    found = stored.name.removeprefix("model.").startswith(_PREDICTION)
    return "predicts further tokens, which llama.cpp's ERNIE does not" if found else None
