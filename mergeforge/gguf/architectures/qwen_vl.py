"""The text parts of Qwen 2-VL, 2.5-VL and 3-VL, and of Omni and ASR models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.llama import transposed_experts
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys
from mergeforge.gguf.architectures.qwen import expert_keys
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import u32

_NORMED = (*GATED, "attn_q_norm", "attn_k_norm")


@architecture(
    "Qwen2VLModel", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5OmniModel"
)
def qwen2vl(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "qwen2vl", hparams(model), vocab="spm_or_gpt2", rename=without_thinker)


@architecture("Qwen3VLForConditionalGeneration", "Qwen3ASRForConditionalGeneration")
def qwen3vl(model: HFModel) -> GGUFModelSpec:
    reads_audio = model.name == "Qwen3ASRForConditionalGeneration"
    keys = hparams(model) | pooling_keys(model)
    keys["n_deepstack_layers"] = u32(0 if reads_audio else _deepstack_layers(model))
    vocab = "qwen3_asr" if reads_audio else "spm_or_gpt2"
    return make_spec(model, "qwen3vl", keys, vocab=vocab, required_per_block=_NORMED, rename=without_thinker)


@architecture("Qwen3VLMoeForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration")
def qwen3vlmoe(model: HFModel) -> GGUFModelSpec:
    omni = model.name == "Qwen3OmniMoeForConditionalGeneration"
    keys = expert_keys(model) | {"n_deepstack_layers": u32(0 if omni else _deepstack_layers(model))}
    return make_spec(
        model,
        "qwen3vlmoe",
        keys,
        *(() if has_output_rows(model) else (transposed_experts,)),
        stacked_experts,
        vocab="qwen3_omni" if omni else "gpt2",
        required_per_block=_NORMED,
        rename=without_thinker,
    )


def has_output_rows(model: HFModel) -> bool:
    """Whether rows of fused experts are outputs, as transformers 5 saves them, and not inputs, as published."""
    hidden, width = int(model.require("hidden_size")), int(model.require("moe_intermediate_size"))
    part, shape = ("gate_up_proj", (2 * width, hidden)) if hidden != 2 * width else ("down_proj", (hidden, width))
    found = (info.shape[1:] for name, info in model.tensors.items() if name.endswith(f"experts.{part}"))
    return next(found, None) == shape


def without_thinker(name: str) -> str:
    """Omni models have their text model inside of a `thinker`."""
    return name.replace("thinker.", "")


def _deepstack_layers(model: HFModel) -> int:
    """Layers of the vision tower whose features are added to the first layers of the text model."""
    vision: Mapping[str, Any] = model.original_config.get("vision_config") or {}
    return len(vision.get("deepstack_visual_indexes") or ())
