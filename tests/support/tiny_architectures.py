"""Tiny random models of many families of transformers, made from their configurations on the spot.

A case names the model type, the Auto class, what its configuration has instead of the usual small
sizes, and what the model eats. Bare folders and files of tensors that no library describes stand at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.quiet import quiet

VOCABULARY = 96
TOKENS = 7
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | IMAGE
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "text_config": TEXT | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": VISION,
    "projection_dim": 16,
}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
BOTH = "input_ids decoder_input_ids"
SPEECH = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1}
WAVES = {
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SPEAKS = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
LLAVA = {
    "vision_config": VISION | {"model_type": "clip_vision_model"},
    "text_config": TEXT | SPEAKS | {"model_type": "llama"},
    "image_token_id": 5,
    "image_seq_length": 4,
}
GEMMA3 = {
    "vision_config": VISION | {"model_type": "siglip_vision_model"},
    "text_config": TEXT | SPEAKS | {"model_type": "gemma3_text"},
    "image_token_id": 5,
    "mm_tokens_per_image": 4,
}
QWEN_VL = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "text_config": TEXT
    | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64}
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "embed_dim": 32,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers, its Auto class, and how its configuration and inputs differ from the usual."""

    kind: str
    auto: str = "AutoModelForCausalLM"
    config: Mapping[str, Any] = field(default_factory=dict)
    eats: tuple[str, ...] = ("input_ids",)
    usual: bool = True

    def make(self, seed: int) -> Any:
        """The model with noise on every trained weight, in float32."""
        import transformers

        with quiet():
            sizes = SIZES if self.usual else {}
            config = transformers.AutoConfig.for_model(self.kind, **{**sizes, **self.config})
            torch.manual_seed(seed)
            model = getattr(transformers, self.auto).from_config(config).float().eval()
            for weight in model.parameters():
                if weight.requires_grad:  # what is computed, such as sinusoids, is not saved
                    weight.data.add_(torch.randn(weight.shape), alpha=0.05)
        return model

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """The model in a folder, and what transformers missed or had left over."""
        import transformers

        with quiet():
            auto = getattr(transformers, self.auto)
            model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        return model.eval(), report

    def outputs(self, model: Any) -> torch.Tensor:
        """Logits, or else the first output that the model gives."""
        with quiet(), torch.no_grad():
            found = model(**{name: _food(name, model.config) for name in self.eats})
        for name in ("logits", "logits_per_image", "last_hidden_state"):
            if isinstance(value := getattr(found, name, None), torch.Tensor):
                return value
        return next(value for value in found.values() if isinstance(value, torch.Tensor))


def _food(name: str, config: Any) -> torch.Tensor:
    """An input of a name, the same each time."""
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        return torch.randn(1, 3, 16, 16, generator=generator)
    if name == "input_values":
        return torch.randn(1, 400, generator=generator)
    if name == "input_features":
        return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    tokens = torch.arange(10, 10 + TOKENS).view(1, -1)
    if name == "input_ids" and (image := getattr(config, "image_token_id", None)) is not None:
        tokens = torch.cat([torch.full((1, 4), image), tokens], dim=1)
    if name == "input_ids" and hasattr(config, "projection_dim"):
        tokens[0, -1] = 2  # CLIP pools at the end of the text
    return tokens


def _a(
    kind: str, auto: str = "CausalLM", eats: str = "input_ids", *, usual: bool = True, **config: Any
) -> Architecture:
    name = "AutoModel" if not auto else f"AutoModelFor{auto}"
    return Architecture(kind, name, config, tuple(eats.split()), usual)


ARCHITECTURES = [
    *(_a(kind, **GROUPED) for kind in ("llama", "mistral", "qwen2", "stablelm", "olmo2", "starcoder2", "smollm3")),
    *(_a(kind, **GROUPED) for kind in ("phi", "phi3", "cohere", "cohere2", "granite", "olmo", "olmo3", "exaone4")),
    *(_a(kind, **GROUPED, head_dim=8) for kind in ("qwen3", "gemma", "gemma2", "glm4", "helium", "nemotron")),
    *(_a(kind, **GROUPED, head_dim=8) for kind in ("seed_oss", "gemma3_text", "arcee", "lfm2")),
    *(_a(kind) for kind in ("gpt2", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "persimmon", "mpt")),
    _a("gptj", rotary_dim=4),
    _a("opt", ffn_dim=48, word_embed_proj_dim=32),
    *(_a(kind, **GROUPED, **EXPERTS) for kind in ("mixtral", "olmoe", "granitemoe", "phimoe")),
    _a("qwen2_moe", **GROUPED, **EXPERTS, shared_expert_intermediate_size=24),
    *(_a(kind, **GROUPED, **EXPERTS, head_dim=8) for kind in ("qwen3_moe", "gpt_oss")),
    *(_a(kind, **LATENT) for kind in ("deepseek_v2", "deepseek_v3")),
    *(_a(kind) for kind in ("mamba", "falcon_mamba", "rwkv")),
    _a("mamba2", num_heads=8, head_dim=8, expand=2, state_size=16, n_groups=1, chunk_size=8),
    *(_a(kind, "MaskedLM") for kind in ("bert", "roberta", "electra", "modernbert")),
    _a("distilbert", "MaskedLM", hidden_dim=48),
    _a("albert", "MaskedLM", embedding_size=16),
    *(_a(kind, "Seq2SeqLM", BOTH, d_kv=8, d_ff=48, decoder_start_token_id=0) for kind in ("t5", "mt5")),
    *(_a(kind, "Seq2SeqLM", BOTH, **ENCODER_DECODER) for kind in ("bart", "marian")),
    _a("whisper", "SpeechSeq2Seq", "input_features decoder_input_ids", **ENCODER_DECODER, **SPEECH),
    _a("wav2vec2", "CTC", "input_values", **WAVES),
    _a("vit", "ImageClassification", "pixel_values", **IMAGE),
    _a("resnet", "ImageClassification", "pixel_values", usual=False, **CONVOLUTIONS),
    *(_a(kind, "", "input_ids pixel_values", usual=False, **TOWERS) for kind in ("clip", "siglip")),
    _a("llava", "ImageTextToText", "input_ids pixel_values", usual=False, **LLAVA),
    _a("gemma3", "ImageTextToText", "input_ids pixel_values", usual=False, **GEMMA3),
    *(_a(kind, "ImageTextToText", usual=False, **QWEN_VL) for kind in ("qwen2_5_vl",)),
]


def unet(seed: int) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of a (tiny) Stable Diffusion UNet of diffusers: 4-D convolutions."""
    shapes: dict[str, tuple[int, ...]] = {"conv_in.weight": (32, 4, 3, 3), "conv_in.bias": (32,)}
    shapes |= {"time_embedding.linear_1.weight": (128, 32), "time_embedding.linear_1.bias": (128,)}
    for at, (into, out) in enumerate(((32, 32), (32, 64))):
        block = f"down_blocks.{at}.resnets.0"
        shapes |= {f"{block}.norm1.weight": (into,), f"{block}.norm1.bias": (into,)}
        shapes |= {f"{block}.conv1.weight": (out, into, 3, 3), f"{block}.conv1.bias": (out,)}
        shapes |= {f"{block}.conv_shortcut.weight": (out, into, 1, 1), f"{block}.time_emb_proj.weight": (out, 128)}
        attention = f"down_blocks.{at}.attentions.0"
        shapes |= {f"{attention}.proj_in.weight": (out, out, 1, 1), f"{attention}.proj_in.bias": (out,)}
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{attention}.transformer_blocks.0.attn1.{name}.weight"] = (out, out)
        shapes[f"{attention}.transformer_blocks.0.ff.net.0.proj.weight"] = (8 * out, out)
        shapes |= {f"down_blocks.{at}.downsamplers.0.conv.weight": (out, out, 3, 3)}
    shapes |= {"conv_out.weight": (4, 32, 3, 3), "conv_out.bias": (4,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cnn(seed: int) -> dict[str, torch.Tensor]:
    """The state dict of a convolutional net with batch norms: running statistics and counters are tensors, too."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, groups=4),
        torch.nn.BatchNorm2d(16),
        torch.nn.Conv1d(16, 4, 5),
        torch.nn.ConvTranspose2d(4, 4, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    for name, value in net.state_dict().items():
        if "running" in name:
            value.add_(torch.rand(value.shape))
    return {name: value.clone() for name, value in net.state_dict().items()}
