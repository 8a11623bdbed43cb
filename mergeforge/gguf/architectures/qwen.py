"""Qwen 2, 2.5 and 3: dense, and with experts; the text parts of models that read audio; RND1."""

from __future__ import annotations

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import GATED, inside_model, make_spec
from mergeforge.gguf.key_values import Value, boolean, u32

_NORMED = (*GATED, "attn_q_norm", "attn_k_norm")


@architecture(
    "Qwen2ForCausalLM",
    "Qwen2AudioForConditionalGeneration",
    "AudioFlamingo3ForConditionalGeneration",
    "DotsOCRForCausalLM",
    "KORMoForCausalLM",
)
def qwen2(model: HFModel) -> GGUFModelSpec:
    keys, notes = hparams(model) | pooling_keys(model), pooling_notes(model, embeds=False)
    return make_spec(model, "qwen2", keys, vocab="spm_or_gpt2", notes=notes)


@architecture("Qwen3ForCausalLM", "StepVLForConditionalGeneration")
def qwen3(model: HFModel) -> GGUFModelSpec:
    keys, notes = hparams(model) | pooling_keys(model), pooling_notes(model, embeds=False)
    return make_spec(model, "qwen3", keys, vocab="spm_or_gpt2", required_per_block=_NORMED, notes=notes)


@architecture("Qwen2Model", "Qwen3Model")
def qwen_without_head(model: HFModel) -> GGUFModelSpec:
    """Embedding models: tensors are named as inside a model with a head."""
    arch, needs = ("qwen2", GATED) if model.name == "Qwen2Model" else ("qwen3", _NORMED)
    keys, notes = hparams(model) | pooling_keys(model), pooling_notes(model)
    return make_spec(model, arch, keys, vocab="spm_or_gpt2", required_per_block=needs, rename=inside_model, notes=notes)


@architecture("Qwen2MoeForCausalLM")
def qwen2moe(model: HFModel) -> GGUFModelSpec:
    return _with_experts(model, "qwen2moe", ())


@architecture("Qwen3MoeForCausalLM")
def qwen3moe(model: HFModel) -> GGUFModelSpec:
    text = "llama.cpp normalizes the weights of the selected experts, but this model (norm_topk_prob: false) does not"
    return _with_experts(model, "qwen3moe", () if model.find("norm_topk_prob") else (WarningText(text),))


@architecture("RND1")
def rnd1(model: HFModel) -> GGUFModelSpec:
    """A diffusion model: attention in both directions."""
    keys = expert_keys(model) | {"attention.causal": boolean(False)}
    keys |= optional(u32, **{"tokenizer.ggml.mask_token_id": model.find("mask_token_id")})
    return make_spec(model, "rnd1", keys, stacked_experts, vocab="gpt2", required_per_block=_NORMED)


def _with_experts(model: HFModel, arch: str, notes: tuple[str, ...]) -> GGUFModelSpec:
    return make_spec(model, arch, expert_keys(model), stacked_experts, vocab="gpt2", notes=notes)


def expert_keys(model: HFModel) -> dict[str, Value]:
    """The common keys, and the sizes of experts."""
    return hparams(model) | optional(
        u32,
        expert_feed_forward_length=model.find("moe_intermediate_size"),
        expert_shared_feed_forward_length=model.find("shared_expert_intermediate_size"),
    )
