"""Llama and models built like it: Mistral, Mixtral, SmolLM3, SmolVLM, Arcee, Nanbeige, Llama 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, HFTensor, RuleResult, inside_model, make_spec
from mergeforge.gguf.key_values import Value, boolean, u32

_SMOLVLM_HEADS = 32
_JANUS = (
    *("model.vision_model.", "model.aligner.", "model.vqmodel."),
    *("model.generation_embeddings.", "model.generation_aligner.", "model.generation_head."),
)
_SQUARED = tuple(need for need in GATED if not need.startswith("ffn_gate"))


@architecture(
    "LlamaForCausalLM",
    "LLaMAForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "IQuestCoderForCausalLM",
    "LlavaForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
def llama(model: HFModel) -> GGUFModelSpec:
    return like_llama(model, "llama")


@architecture("VLlama3ForCausalLM")
def smolvlm(model: HFModel) -> GGUFModelSpec:
    """The text part of SmolVLM 2, whose config may lack the number of heads."""
    model = replace(model, config={"num_attention_heads": _SMOLVLM_HEADS, **model.config})
    return like_llama(model, "llama", rename=lambda name: name.replace("text_model.", ""))


@architecture("CogVLMForCausalLM")
def cogvlm(model: HFModel) -> GGUFModelSpec:
    """Experts for pictures stand beside those for text."""
    return like_llama(model, "cogvlm", required_per_block=("attn_norm", "attn_qkv", "attn_output", "ffn_norm"))


@architecture("JanusForConditionalGeneration")
def janus(model: HFModel) -> GGUFModelSpec:
    return like_llama(model, "llama", drops=_JANUS)


@architecture("Sarashina2VisionForCausalLM")
def sarashina_vision(model: HFModel) -> GGUFModelSpec:
    """The text part is under `llm`; a norm of the vision tower is beside it."""
    return like_llama(model, "llama", rename=_text_of_sarashina, drops=("vision norm.",))


def _text_of_sarashina(name: str) -> str:
    return name.replace("llm.", "", 1) if name.startswith("llm.") else f"vision {name}"


@architecture("LlamaBidirectionalModel")
def llama_embed(model: HFModel) -> GGUFModelSpec:
    return like_llama(model, "llama-embed", notes=pooling_notes(model, writes_key=False))


@architecture("LlamaModel")
def llama_without_head(model: HFModel) -> GGUFModelSpec:
    return like_llama(model, "llama", rename=inside_model, notes=pooling_notes(model, writes_key=False))


@architecture("SmolLM3ForCausalLM")
def smollm3(model: HFModel) -> GGUFModelSpec:
    """llama.cpp has no rope in every fourth layer, whatever the config says."""
    rope = model.find("no_rope_layers")
    usual = [int((at + 1) % 4 != 0) for at in range(model.layers)]
    odd = model.find("no_rope_layer_interval") not in (None, 4) if rope is None else rope != usual
    notes = [WarningText("llama.cpp has no rope in every fourth layer, but this model differs")] if odd else ()
    return like_llama(model, "smollm3", notes=notes)


@architecture("ArceeForCausalLM")
def arcee(model: HFModel) -> GGUFModelSpec:
    keys, notes = llama_keys(model) | pooling_keys(model), pooling_notes(model, embeds=False)
    return like_llama(model, "arcee", keys, required_per_block=_SQUARED, notes=notes)


@architecture("NanbeigeForCausalLM")
def nanbeige(model: HFModel) -> GGUFModelSpec:
    """All layers run num_loops times; the final norm may be left out between the loops."""
    keys = llama_keys(model) | {
        "num_loops": u32(max(1, int(model.find("num_loops") or 1))),
        "skip_loop_final_norm": boolean(bool(model.find("skip_loop_final_norm"))),
    }
    return like_llama(model, "nanbeige", keys, names_of="llama")


@architecture("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
def llama4(model: HFModel) -> GGUFModelSpec:
    """Experts are stored transposed; intermediate_size is theirs, intermediate_size_mlp that of dense layers."""
    keys = llama_keys(model)
    keys["feed_forward_length"] = u32(model.require("intermediate_size_mlp"))
    keys["interleave_moe_layer_step"] = u32(model.require("interleave_moe_layer_step"))
    keys["expert_feed_forward_length"] = u32(model.require("intermediate_size"))
    if set(model.find("layer_types") or [""]) == {"full_attention"}:
        keys["attention.sliding_window"] = u32(0)
    constants = rope_freq_factors_llama3(model)
    return make_spec(
        model,
        "llama4",
        keys,
        transposed_experts,
        vocab="gpt2",
        constants=constants,
        required_per_block=(*ATTENTION, "ffn_norm"),
    )


def like_llama(
    model: HFModel,
    arch: str,
    keys: dict[str, Value] | None = None,
    required_per_block: Sequence[str] = GATED,
    notes: Iterable[str] = (),
    rename: Callable[[str], str] = str,
    drops: tuple[str, ...] = (),
    names_of: str = "",
) -> GGUFModelSpec:
    """The spec of a family that differs from Llama only in `arch` and some keys.

    drops: what names of tensors start with that are not part of the text model.
    """

    def others(stored: HFTensor) -> RuleResult:
        return "not part of the text model" if drops and stored.name.startswith(drops) else None

    return make_spec(
        model,
        arch,
        llama_keys(model) if keys is None else keys,
        others,
        permute_rope_heads,
        stacked_experts,
        vocab="llama",
        required_per_block=required_per_block,
        constants=rope_freq_factors_llama3(model),
        notes=notes,
        rename=rename,
        names_of=names_of,
    )


def llama_keys(model: HFModel) -> dict[str, Value]:
    return hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "rope.dimension_count": u32(model.head_dim),
    }


def transposed_experts(stored: HFTensor) -> RuleResult:
    """Llama 4's stacked experts: gate and up as [experts, hidden, 2 x width], down as [experts, width, hidden]."""
    if not stored.name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    count, rows, columns = stored.info.shape
    if stored.name.endswith("down_proj"):
        return (stored.block_tensor("ffn_down_exps", (count, columns, rows), transpose=rows),)
    width = columns // 2
    return (
        stored.block_tensor("ffn_gate_exps", (count, width, rows), transpose=rows, columns=slice(0, width)),
        stored.block_tensor("ffn_up_exps", (count, width, rows), transpose=rows, columns=slice(width, None)),
    )
