"""MiniMax M2: experts, norms over all heads of queries and keys."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import u32


@architecture("MiniMaxM2ForCausalLM")
def minimax_m2(model: HFModel) -> GGUFModelSpec:
    rotated = model.find("rotary_dim") or int(model.head_dim * model.rope.get("partial_rotary_factor", 1.0))
    keys = hparams(model) | {
        "expert_feed_forward_length": u32(model.require("intermediate_size")),
        "rope.dimension_count": u32(rotated),
    }
    needs = (*GATED, "attn_q_norm", "attn_k_norm")
    return make_spec(model, "minimax-m2", keys, stacked_experts, vocab="gpt2", required_per_block=needs)
