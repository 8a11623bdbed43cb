"""The vision and audio towers of Gemma 4."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import string
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import audio_keys, layer_count, layer_norm_eps, spectrogram_keys, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import ALWAYS_F32, RuleResult, TowerTensor, blocks, flat_patches, make_mmproj
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_IMAGE_SIZE = 224  # the converter's: images have any size
_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
_PARTS = ("conformer.", "vision_model.model.", "model.vision_tower.", "model.embed_vision.", "model.embed_audio.")


@mmproj("Gemma4ForConditionalGeneration")
def gemma4(model: MultimodalModel) -> GGUFModelSpec:
    model, audio = model.with_vision(image_size=_IMAGE_SIZE), model.audio
    keys = vision_keys(model)
    own = {"clip.vision.projector_type": string("gemma4v")}
    own |= layer_norm_eps(model.vision.get("layer_norm_eps", 1e-6))
    if audio:
        keys |= audio_keys(model.with_audio(intermediate_size=find(audio, "hidden_size") * 4))
        own["clip.audio.projector_type"] = string("gemma4a")
        own |= spectrogram_keys(audio.get("input_feat_size", 128), audio.get("layer_norm_eps", 1e-6))
    return make_mmproj(
        model,
        keys | own,
        key_scale,
        depthwise_convolution,
        flat_patches("patch_embedder.input_proj.weight"),
        prefixes=_PARTS,
        required=("v.patch_embd", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=_name,
        fixed_types={"position_embedding_table": ALWAYS_F32, ".conv": ALWAYS_F32, "_conv": ALWAYS_F32},
    )


def key_scale(stored: TowerTensor) -> RuleResult:
    """The scale of the audio tower's keys: llama.cpp has its softplus."""
    if not stored.name.endswith(("per_dim_key_scale.weight", "per_dim_scale.weight")):
        return None
    return (stored.tensor(softplus=True),)


def depthwise_convolution(stored: TowerTensor) -> RuleResult:
    """The convolution loses its dimension of one."""
    if not stored.name.endswith("lconv1d.depthwise_conv1d.weight"):
        return None
    return (stored.tensor(shape=(stored.info.shape[0], stored.info.shape[-1])),)


def _name(name: str) -> str:
    """The name without the modules that clip values, and with an ending."""
    if "audio_tower" in name or "embed_audio" in name:
        name = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
        return f"{name}.weight" if name.endswith(("per_dim_key_scale", "per_dim_scale")) else name
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    return f"{name}.weight" if name.endswith(("layer_scalar", "position_embedding_table")) else name
