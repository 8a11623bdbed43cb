"""GPT-NeoX (Pythia): q, k and v of a head are adjacent."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import DECODER, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import boolean, f32, u32


@architecture("GPTNeoXForCausalLM")
def gptneox(model: HFModel) -> GGUFModelSpec:
    """The rotated part of a head is rotary_pct, or rope's partial_rotary_factor in transformers 5.

    The converter reads only the first and fails without it. It writes no general.file_type.
    """
    part = model.find("rotary_pct") or model.rope.get("partial_rotary_factor", 0.25)
    keys = {
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "block_count": u32(model.layers),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "rope.dimension_count": u32(int(part * model.head_dim)),
        "attention.head_count": u32(model.heads),
        "use_parallel_residual": boolean(model.config.get("use_parallel_residual", True)),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_eps")),
    }
    return make_spec(model, "gptneox", keys, query_key_value, vocab="gpt2", required_per_block=DECODER)


def query_key_value(stored: HFTensor) -> RuleResult:
    """Rows [heads, (q, k, v), head] become all q, all k, all v."""
    if ".query_key_value." not in stored.name:
        return None
    import numpy as np

    size = stored.rows_per_part(3 * stored.model.heads)
    return (stored.tensor(rows=np.concatenate(deinterleave_qkv(stored.info.rows, stored.model.heads, (size,) * 3))),)
