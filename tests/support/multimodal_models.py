"""Tiny models with towers for images or audio, as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.gguf_models import MROPE, SIZES, TOKENIZERS, Shapes, stored_shapes, values
from support.quiet import quiet

TEXT = {**SIZES, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
SIGLIP = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
SIGLIP |= {"image_size": 56, "patch_size": 14}
QWEN = {"depth": 3, "hidden_size": 64, "out_hidden_size": 128, "num_heads": 2, "intermediate_size": 96}
QWEN |= {"patch_size": 14, "num_position_embeddings": 64}
WHISPER = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
WHISPER |= {"d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 96}
GEMMA4 = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
GEMMA4 |= {"intermediate_size": 96, "position_embedding_size": 64}
GEMMA4_TEXT = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 32}
GEMMA4_TEXT["layer_types"] = ["full_attention"]
INSIDE = {"vision_tower.": "vision_tower.vision_model."}
MMPROJ_TYPES = ("f32", "f16", "bf16", "q8_0")
PROCESSOR: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.26, 0.27]}


@dataclass(frozen=True)
class Multimodal:
    """A tiny model: `kind` names transformers' config class, `model` its model class.

    config: keys of config.json beside the class's. processor: keys of preprocessor_config.json. published: beginnings
    of names that transformers saves, and those in published checkpoints. by_hand: config and shapes of code on the Hub.
    """

    name: str
    kind: str = ""
    model: str = ""
    vision: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Callable[[], tuple[dict[str, Any], Shapes]] | None = None
    published: Mapping[str, str] = field(default_factory=dict)


MULTIMODAL = (
    Multimodal(
        "gemma3",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        SIGLIP,
        processor={"image_seq_length": 4},
        published=INSIDE,
    ),
    Multimodal(
        "gemma3-4",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {**SIGLIP, "image_size": 224},
        processor={"image_seq_length": 16},
        published=INSIDE,
    ),
    Multimodal(
        "qwen2vl",
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {"depth": 3, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
        text={"rope_parameters": MROPE},
    ),
    Multimodal(
        "qwen2.5vl",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {**QWEN, "depth": 4, "fullatt_block_indexes": [1, 3]},
        text={"rope_parameters": MROPE},
    ),
    Multimodal(
        "qwen3vl",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {**QWEN, "deepstack_visual_indexes": [1]},
        text={"rope_parameters": MROPE},
    ),
    Multimodal(
        "qwen3vlmoe",
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {**QWEN, "deepstack_visual_indexes": [0, 1]},
        text={"rope_parameters": MROPE, "num_experts": 4, "moe_intermediate_size": 64},
    ),
    Multimodal("qwen3.5", "qwen3_5", "Qwen3_5ForConditionalGeneration", QWEN),
    Multimodal("glm4v", "glm4v", "Glm4vForConditionalGeneration", QWEN),
    Multimodal(
        "pixtral", "llava", "LlavaForConditionalGeneration", {**SIGLIP, "model_type": "pixtral", "head_dim": 32}
    ),
    Multimodal(
        "mistral3",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {**SIGLIP, "model_type": "pixtral", "head_dim": 32, "hidden_act": "silu"},
    ),
    Multimodal(
        "lighton-ocr",
        "lighton_ocr",
        "LightOnOcrForConditionalGeneration",
        {**SIGLIP, "head_dim": 32},
        config={"architectures": ["LightOnOCRForConditionalGeneration"]},
    ),
    Multimodal("idefics3", "idefics3", "Idefics3ForConditionalGeneration", SIGLIP),
    Multimodal(
        "smolvlm",
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        {**SIGLIP, "model_type": "smolvlm_vision"},
        processor={"size": {"longest_edge": 2048}},
    ),
    Multimodal(
        "llama4",
        "llama4",
        "Llama4ForConditionalGeneration",
        {**SIGLIP, "vision_output_dim": 128, "projector_input_dim": 128, "projector_output_dim": 128},
    ),
    Multimodal(
        "internvl",
        "internvl",
        "InternVLForConditionalGeneration",
        {**SIGLIP, "image_size": [56, 56], "patch_size": [14, 14], "architectures": ["InternVisionModel"]},
        config={"min_dynamic_patch": 1, "max_dynamic_patch": 12},
        published={part: f"model.{part}" for part in ("vision_tower.", "multi_modal_projector.")},
    ),
    Multimodal(
        "lfm2-vl",
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        {**SIGLIP, "patch_size": 16, "num_patches": 16, "vision_use_head": False},
        processor={"resample": 2},
        published={f"model.{old}": f"model.{new}" for old, new in INSIDE.items()},
    ),
    Multimodal(
        "cohere2-vision",
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        {**SIGLIP, "vision_use_head": False},
        processor={"max_patches": 12},
    ),
    Multimodal(
        "exaone4.5",
        "exaone4_5",
        "Exaone4_5_ForConditionalGeneration",
        {**QWEN, "num_key_value_heads": 1, "depth": 4, "fullatt_block_indexes": [1, 3]},
        text={"model_type": "exaone4"},
        processor={"min_pixels": 3136, "max_pixels": 1003520},
    ),
    Multimodal(
        "gemma4",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {**GEMMA4, "patch_size": 14, "head_dim": 32},
        {**GEMMA4, "output_proj_dims": 64, "subsampling_conv_channels": [16, 8]},
        text=GEMMA4_TEXT,
    ),
    Multimodal(
        "gemma4-vision",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {**GEMMA4, "use_clipped_linears": True, "standardize": True, "head_dim": 32},
        text=GEMMA4_TEXT,
    ),
    Multimodal(
        "hunyuan-vl",
        "hunyuan_vl",
        "HunYuanVLForConditionalGeneration",
        {**SIGLIP, "num_key_value_heads": 2, "text_hidden_size": 128, "out_hidden_size": 128},
        processor={"min_pixels": 3136, "max_pixels": 1003520},
    ),
    Multimodal("kimi-vl", by_hand=lambda: kimi_vl()),
    Multimodal("kimi-k2.5", by_hand=lambda: kimi_k25()),
    Multimodal("voxtral", "voxtral", "VoxtralForConditionalGeneration", audio=WHISPER),
    Multimodal("qwen2-audio", "qwen2_audio", "Qwen2AudioForConditionalGeneration", audio=WHISPER),
)


def make_multimodal(tiny: Multimodal, folder: Path) -> Path:
    """Write the folder: config, weights that follow from their names, tokenizer and image processor."""
    config, shapes = tiny.by_hand() if tiny.by_hand else _saved(tiny, folder)
    write_folder(folder, config, shapes, dict(PROCESSOR) | dict(tiny.processor))
    return folder


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Shapes, processor: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tensors = {name: values(name, shape).to(torch.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, data in TOKENIZERS["bpe"]().items():
        if name == "tokenizer.json":
            tokenizer = json.loads(data)
            number = max(token["id"] for token in tokenizer["added_tokens"])
            tokenizer["added_tokens"][-1] = {**tokenizer["added_tokens"][-1], "content": "[IMG_BREAK]", "id": number}
            data = json.dumps(tokenizer).encode()
        (folder / name).write_bytes(data)


def _saved(tiny: Multimodal, folder: Path) -> tuple[dict[str, Any], Shapes]:
    """config.json, and the names and shapes that transformers saves."""
    import transformers

    parts = {"vision_config": dict(tiny.vision), "audio_config": dict(tiny.audio)}
    parts = {name: part for name, part in parts.items() if part}
    config = transformers.CONFIG_MAPPING[tiny.kind](text_config={**TEXT, **tiny.text}, **parts, **tiny.options)
    with quiet():
        getattr(transformers, tiny.model)(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    shapes = stored_shapes(folder)
    for old, new in tiny.published.items():
        shapes = {f"{new}{name.removeprefix(old)}" if name.startswith(old) else name: shapes[name] for name in shapes}
    return {**saved, **tiny.config}, shapes


def kimi_vl() -> tuple[dict[str, Any], Shapes]:
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    config = {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl_x", "text_config": TEXT}
    shapes = _with_bias({"patch_embed.proj": (64, 3, 14, 14), "encoder.final_layernorm": (64,)}, "vision_tower.")
    shapes["vision_tower.patch_embed.pos_emb.weight"] = (8, 8, 64)
    layer: Shapes = {"norm0": (64,), "norm1": (64,), "wqkv": (192, 64), "wo": (64, 64)}
    layer |= {"mlp.fc0": (96, 64), "mlp.fc1": (64, 96)}
    for number in range(3):
        shapes |= _with_bias(layer, f"vision_tower.encoder.blocks.{number}.")
    projector: Shapes = {"pre_norm": (64,), "linear_1": (256, 256), "linear_2": (128, 256)}
    shapes |= _with_bias(projector, "multi_modal_projector.")
    shapes["language_model.model.embed_tokens.weight"] = (320, 128)
    return {**config, "vision_config": {**vision, "patch_size": 14}}, shapes


def kimi_k25() -> tuple[dict[str, Any], Shapes]:
    config, shapes = kimi_vl()
    names = {"multi_modal_projector.linear_1": "mm_projector.proj.0", "multi_modal_projector.": "mm_projector."}
    names = {"multi_modal_projector.linear_2": "mm_projector.proj.2", **names}
    for old, new in names.items():
        shapes = {name.replace(old, new): shape for name, shape in shapes.items()}
    vision = {"patch_size": 14, "init_pos_emb_height": 8, "init_pos_emb_width": 8, "init_pos_emb_time": 4}
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    vision = {**vision, **{f"vt_{name}": size for name, size in sizes.items()}, "num_attention_heads": 2}
    return {**config, "architectures": ["KimiK25ForConditionalGeneration"], "vision_config": vision}, shapes


def _with_bias(shapes: Shapes, start: str) -> Shapes:
    weights = {f"{start}{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{start}{name}.bias": shape[:1] for name, shape in shapes.items()}
