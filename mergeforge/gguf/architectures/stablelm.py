"""StableLM: part of each head is rotated; StableLM 2 12B has a norm for every head."""

from __future__ import annotations

import re

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import boolean, f32, u32

_NORM = re.compile(r"\.([qk])_layernorm\.norms\.(\d+)\.weight$")
_NEEDS = (*ATTENTION, "ffn_up", "ffn_down", "ffn_gate")  # with parallel residuals there is no ffn_norm


@architecture("StableLmForCausalLM", "StableLMEpochForCausalLM", "LlavaStableLMEpochForCausalLM")
def stablelm(model: HFModel) -> GGUFModelSpec:
    part = model.rope.get("partial_rotary_factor", 0.25)
    keys = {
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "rope.dimension_count": u32(int(part * (model.hidden // model.heads))),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
        "use_parallel_residual": boolean(model.config.get("use_parallel_residual", True)),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_eps", "norm_eps")),
        **FILE_TYPE,
    }
    return make_spec(model, "stablelm", keys, head_norms, vocab="stablelm", required_per_block=_NEEDS)


def head_norms(stored: HFTensor) -> RuleResult:
    """The norms of a layer's heads become one matrix with a row for each head."""
    found = _NORM.search(stored.name)
    if not found:
        return None
    heads = stored.model.heads if found[1] == "q" else stored.model.kv_heads
    return (stored.block_tensor(f"attn_{found[1]}_norm", (heads, stored.info.numel), first_row=int(found[2])),)
