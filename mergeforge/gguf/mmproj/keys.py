"""The keys that all mmproj files have, in the converter's order."""

from __future__ import annotations

from collections.abc import Mapping

from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.key_values import Value, array, boolean, f32, string, u32
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_LAYERS = (
    "n_layers",
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "depth",
    "layers",
    "encoder_layers",
    "vt_num_hidden_layers",
)
_HEADS = ("num_attention_heads", "num_heads", "heads", "vt_num_attention_heads")
_ACTIVATIONS = {"gelu": "use_gelu", "silu": "use_silu"}


def vision_keys(model: MultimodalModel) -> dict[str, Value]:
    """`clip.vision.*` of every vision tower; its eps is added by the families, which have different defaults."""
    vision = model.vision
    return {
        **FILE_TYPE,
        "clip.has_vision_encoder": boolean(True),
        "clip.vision.projection_dim": u32(find(model.text, "hidden_size", "n_embd")),
        "clip.vision.image_size": u32(find(vision, "image_size")),
        "clip.vision.patch_size": u32(find(vision, "patch_size")),
        "clip.vision.embedding_length": u32(find(vision, "hidden_size", "width", "vt_hidden_size")),
        "clip.vision.feed_forward_length": u32(find(vision, "intermediate_size", "vt_intermediate_size")),
        "clip.vision.block_count": u32(layer_count(vision)),
        "clip.vision.attention.head_count": u32(find(vision, *_HEADS)),
        "clip.vision.image_mean": array("f32", model.channel_values("image_mean")),
        "clip.vision.image_std": array("f32", model.channel_values("image_std")),
    }


def audio_keys(model: MultimodalModel) -> dict[str, Value]:
    """`clip.audio.*` of every audio tower."""
    audio = model.audio
    return {
        **FILE_TYPE,
        "clip.has_audio_encoder": boolean(True),
        "clip.audio.projection_dim": u32(find(model.text, "hidden_size", "n_embd")),
        "clip.audio.embedding_length": u32(find(audio, "hidden_size", "d_model")),
        "clip.audio.feed_forward_length": u32(find(audio, "intermediate_size", "encoder_ffn_dim")),
        "clip.audio.block_count": u32(layer_count(audio)),
        "clip.audio.attention.head_count": u32(find(audio, "num_attention_heads", "encoder_attention_heads")),
    }


def spectrogram_keys(mel_bins: int, eps: float) -> dict[str, Value]:
    return {"clip.audio.num_mel_bins": u32(mel_bins), "clip.audio.attention.layer_norm_epsilon": f32(eps)}


def projector_type(name: str) -> dict[str, Value]:
    return {"clip.projector_type": string(name)}


def layer_norm_eps(eps: float) -> dict[str, Value]:
    return {"clip.vision.attention.layer_norm_epsilon": f32(eps)}


def activation(name: str) -> dict[str, Value]:
    """`clip.use_gelu` or `clip.use_silu`, for gelu or silu. Raises KeyError for another activation."""
    return {f"clip.{_ACTIVATIONS[name]}": boolean(True)}


def layer_count(part: Mapping[str, object]) -> int:
    return int(find(part, *_LAYERS))
