"""Mamba, Mamba 2, Falcon-Mamba and Jamba: layers with a state instead of attention."""

from __future__ import annotations

import re

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, Rule, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, u32

_CONTEXT = 1 << 20  # as in the converter: there is no limit
_NEEDS = ("attn_norm", "ssm_in", "ssm_conv1d", "ssm_dt", "ssm_out")


@architecture("MambaForCausalLM", "MambaLMHeadModel", "FalconMambaForCausalLM")
def mamba(model: HFModel) -> GGUFModelSpec:
    hidden = int(model.require("hidden_size", "d_model"))
    inner = int(model.find("intermediate_size", "d_inner") or 2 * hidden)
    if inner != 2 * hidden:
        raise SourceError(f"config.json: llama.cpp's mamba needs an inner size of {2 * hidden}, not {inner}")
    keys = {
        **_unlimited(hidden, model.layers),
        "ssm.conv_kernel": u32(model.find("conv_kernel", "d_conv") or 4),
        "ssm.inner_size": u32(inner),
        "ssm.state_size": u32(model.find("state_size", "d_state") or 16),
        "ssm.time_step_rank": u32(model.find("time_step_rank", "dt_rank") or -(hidden // -16)),
        "attention.layer_norm_rms_epsilon": f32(model.find("layer_norm_epsilon", "rms_norm_eps") or 1e-5),
        "ssm.dt_b_c_rms": boolean(model.find("model_type") == "falcon_mamba"),
        **FILE_TYPE,
    }
    return make_spec(model, "mamba", keys, tied, decay, convolution, vocab="gpt2_or_spm", required_per_block=_NEEDS)


@architecture("Mamba2ForCausalLM")
def mamba2(model: HFModel) -> GGUFModelSpec:
    hidden = int(model.require("hidden_size", "d_model", "dim"))
    inner = int(model.find("intermediate_size", "d_inner") or (model.find("expand") or 2) * hidden)
    size = int(model.find("mamba_d_head", "head_dim") or 64)
    groups = int(model.find("n_groups") or 1)
    keys = {
        **_unlimited(hidden, model.layers),
        "ssm.conv_kernel": u32(model.find("conv_kernel", "d_conv") or 4),
        "ssm.inner_size": u32(inner),
        "ssm.state_size": u32(model.find("state_size", "d_state") or 128),
        "ssm.time_step_rank": u32(inner // size),
        "ssm.group_count": u32(groups),
        "attention.layer_norm_rms_epsilon": f32(model.find("layer_norm_epsilon", "rms_norm_eps") or 1e-5),
        **FILE_TYPE,
    }
    return make_spec(
        model,
        "mamba2",
        keys,
        columns_of_one,
        grouped_norm(groups),
        convolution,
        vocab="spm_or_gpt2",
        required_per_block=_NEEDS,
        rename=mamba2_name,
    )


@architecture("JambaForCausalLM")
def jamba(model: HFModel) -> GGUFModelSpec:
    """Attention in every attn_layer_period-th layer, experts in every expert_layer_period-th."""
    hidden = int(model.require("hidden_size", "mamba_d_model"))
    offset, period = int(model.require("attn_layer_offset")), int(model.require("attn_layer_period"))
    groups = [model.kv_heads if at >= offset and (at - offset) % period == 0 else 0 for at in range(model.layers)]
    keys = {
        "block_count": u32(model.layers),
        "context_length": u32(model.require("max_position_embeddings", "n_ctx")),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(model.require("intermediate_size")),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": array("i32", groups),
        "ssm.conv_kernel": u32(model.find("mamba_d_conv") or 4),
        "ssm.inner_size": u32(int(model.require("mamba_expand")) * hidden),
        "ssm.state_size": u32(model.find("mamba_d_state") or 16),
        "ssm.time_step_rank": u32(model.find("mamba_dt_rank") or -(hidden // -16)),
        "attention.layer_norm_rms_epsilon": f32(model.find("layer_norm_epsilon", "rms_norm_eps") or 1e-6),
        "expert_count": u32(model.require("num_local_experts", "num_experts")),
        "expert_used_count": u32(model.require("num_experts_per_tok", "num_experts_per_token")),
        **FILE_TYPE,
    }
    moe_offset, moe_period = int(model.require("expert_layer_offset")), int(model.require("expert_layer_period"))

    def name(stored: str) -> str:
        stored = stored.replace(".moe.", ".feed_forward.")
        layer = re.search(r"\.layers\.(\d+)\.", stored)
        dense = layer and not (int(layer[1]) >= moe_offset and (int(layer[1]) - moe_offset) % moe_period == 0)
        return stored.replace(".experts.0.", ".") if dense else stored

    return make_spec(
        model,
        "jamba",
        keys,
        decay,
        convolution,
        stacked_experts,
        vocab="jamba",
        required_per_block=("attn_norm", "ffn_norm", "ffn_gate|ffn_gate_exps", "attn_q|ssm_in", "attn_output|ssm_out"),
        rename=name,
    )


def _unlimited(hidden: int, layers: int) -> dict[str, Value]:
    return {
        "context_length": u32(_CONTEXT),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(0),
        "attention.head_count": u32(0),
        "block_count": u32(layers),
    }


def mamba2_name(name: str) -> str:
    """Codestral's `model.backbone` is Mamba 2's `backbone`; dt_bias is a bias of dt_proj."""
    name = name.removeprefix("model.") if name.startswith(("model.backbone", "model.lm_head")) else name
    return re.sub(r"\.dt_bias$", ".dt_proj.bias", name)


def tied(stored: HFTensor) -> RuleResult:
    """A head that is the embedding is not written."""
    is_tied = stored.model.find("tie_word_embeddings") is not False and stored.name == "lm_head.weight"
    return "tied to the embedding" if is_tied else None


def decay(stored: HFTensor) -> RuleResult:
    """A_log becomes -exp(A_log)."""
    return (stored.tensor(negative_exp=True),) if stored.name.endswith(".A_log") else None


def columns_of_one(stored: HFTensor) -> RuleResult:
    """Mamba 2's A and D: one value for each head, as a matrix with one column."""
    if not stored.name.endswith((".A_log", ".D")):
        return None
    return (stored.tensor(shape=(stored.info.numel, 1), negative_exp=stored.name.endswith(".A_log")),)


def convolution(stored: HFTensor) -> RuleResult:
    """The convolution loses its dimension of one."""
    if not stored.name.endswith(".conv1d.weight"):
        return None
    return (stored.tensor(shape=(stored.info.shape[0], stored.info.shape[-1])),)


def grouped_norm(groups: int, ending: str = ".mixer.norm.weight") -> Rule:
    """A rule for the norm inside of a Mamba 2 layer: one row for each group."""

    def rule(stored: HFTensor) -> RuleResult:
        if not stored.name.endswith(ending):
            return None
        return (stored.tensor(shape=(groups, stored.info.numel // groups)),)

    return rule
