"""Falcon-H1: attention and Mamba 2 in every layer; multipliers of the config are folded into the weights."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.state_space import columns_of_one, convolution, grouped_norm, mamba2_name
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import f32, u32


@architecture("FalconH1ForCausalLM")
def falcon_h1(model: HFModel) -> GGUFModelSpec:
    inner, groups = int(model.require("mamba_d_ssm")), int(model.require("mamba_n_groups"))
    keys = {
        "context_length": u32(model.require("max_position_embeddings")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "block_count": u32(model.layers),
        "ssm.conv_kernel": u32(model.require("mamba_d_conv")),
        "ssm.inner_size": u32(inner),
        "ssm.state_size": u32(model.require("mamba_d_state")),
        "ssm.time_step_rank": u32(inner // int(model.require("mamba_d_head"))),
        "ssm.group_count": u32(groups),
        "attention.layer_norm_rms_epsilon": f32(model.require("rms_norm_eps")),
        **FILE_TYPE,
        "vocab_size": u32(model.require("vocab_size")),
        "attention.head_count_kv": u32(model.kv_heads),
        **head_sizes(model.head_dim),
        "rope.freq_base": f32(model.rope["rope_theta"]),
    }
    return make_spec(
        model,
        "falcon-h1",
        keys,
        scaled_state_input,
        scaled,
        columns_of_one,
        convolution,
        grouped_norm(groups, ".mamba.norm.weight"),
        vocab="gpt2",
        required_per_block=(*ATTENTION, "ssm_in", "ssm_conv1d", "ssm_out", "ffn_gate", "ffn_up", "ffn_down"),
        required=("token_embd", "output_norm"),
        rename=mamba2_name,
    )


def scaled_state_input(stored: HFTensor) -> RuleResult:
    """mamba.in_proj: gate, x, B, C and dt, each with its own multiplier."""
    if not stored.name.endswith(".mamba.in_proj.weight"):
        return None
    model = stored.model
    inner = int(model.require("mamba_d_ssm"))
    state = int(model.require("mamba_n_groups")) * int(model.require("mamba_d_state"))
    ends = [*accumulate((inner, inner, state, state)), stored.info.rows]
    whole, parts = model.require("ssm_in_multiplier"), model.require("ssm_multipliers")
    targets: list[TensorTarget] = []
    for first, end, part in zip([0, *ends], ends, parts, strict=False):
        rows = np.arange(first, end, dtype=np.int64)
        targets.append(stored.tensor(rows=rows, first_row=first, factors=(whole, part)))
    return tuple(targets)


def scaled(stored: HFTensor) -> RuleResult:
    factors = next((found for part, found in _factors(stored.model).items() if part in stored.name), None)
    return (stored.tensor(factors=factors),) if factors else None


def _factors(model: HFModel) -> dict[str, tuple[float, ...]]:
    """Part of a name -> what its tensor is multiplied by."""
    entrance = float(model.require("attention_in_multiplier"))
    gate, down = model.require("mlp_multipliers")
    return {
        "down_proj": (down,),
        "gate_proj": (gate,),
        "k_proj": (model.require("key_multiplier"), entrance),
        "q_proj": (entrance,),
        "v_proj": (entrance,),
        "o_proj": (model.require("attention_out_multiplier"),),
        "out_proj": (model.require("ssm_out_multiplier"),),
        "lm_head": (model.require("lm_head_multiplier"),),
        "embed_tokens": (model.require("embedding_multiplier"),),
    }
