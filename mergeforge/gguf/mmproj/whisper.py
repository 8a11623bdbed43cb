"""Audio encoders of Whisper's kind: Qwen 2 Audio, Ultravox and Voxtral."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import audio_keys, layer_count, projector_type, spectrogram_keys
from mergeforge.gguf.mmproj.mmproj_spec import ALWAYS_F16, blocks, column_bias, make_mmproj
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
_VOXTRAL_STACK = 4  # the converter's


@mmproj("Qwen2AudioForConditionalGeneration")
def qwen2_audio(model: MultimodalModel) -> GGUFModelSpec:
    return _whisper(model, "qwen2a")


@mmproj("UltravoxModel")
def ultravox(model: MultimodalModel) -> GGUFModelSpec:
    return _whisper(model, "ultravox", find(model.config, "stack_factor"))


@mmproj("VoxtralForConditionalGeneration")
def voxtral(model: MultimodalModel) -> GGUFModelSpec:
    return _whisper(model, "voxtral", _VOXTRAL_STACK)


def _whisper(model: MultimodalModel, projector: str, stack_factor: int = 0) -> GGUFModelSpec:
    keys = audio_keys(model) | projector_type(projector)
    keys |= spectrogram_keys(find(model.audio, "num_mel_bins"), model.audio.get("layer_norm_eps", 1e-5))
    if stack_factor:
        keys["clip.audio.projector.stack_factor"] = u32(stack_factor)
    return make_mmproj(
        model,
        keys,
        column_bias("conv1", "conv2"),
        prefixes=("audio_tower.", "audio.multi_modal_projector."),
        required=("a.conv1d.1", *blocks(layer_count(model.audio), *_BLOCK, tower="a")),
        rename=_name,
        fixed_types={".conv1.weight": ALWAYS_F16, ".conv2.weight": ALWAYS_F16},
    )


def _name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"audio.{name}" if name.startswith("multi_modal_projector") else name
