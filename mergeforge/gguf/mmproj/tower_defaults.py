"""Values that transformers uses for keys missing from the vision or audio part of config.json, by model type.

Only keys that an mmproj file depends on. They are the defaults of the config classes of transformers 5, which a test
compares, written down here because the output must not depend on the installed transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

_TABLE = """
qwen2_vl_vision hidden_size=3584 embed_dim=1280 patch_size=14 depth=32 num_heads=16
qwen2_5_vl_vision hidden_size=3584 intermediate_size=3420 patch_size=14 depth=32 num_heads=16
  fullatt_block_indexes=[7,15,23,31]
qwen3_vl_vision hidden_size=1152 intermediate_size=4304 patch_size=16 depth=27 num_heads=16 spatial_merge_size=2
  num_position_embeddings=2304 deepstack_visual_indexes=[8,16,24]
qwen3_vl_moe_vision hidden_size=1152 intermediate_size=4304 patch_size=16 depth=27 num_heads=16 spatial_merge_size=2
  num_position_embeddings=2304 deepstack_visual_indexes=[8,16,24]
qwen3_5_vision hidden_size=1152 intermediate_size=4304 patch_size=16 depth=27 num_heads=16 spatial_merge_size=2
  num_position_embeddings=2304
qwen3_5_moe_vision hidden_size=1152 intermediate_size=4304 patch_size=16 depth=27 num_heads=16 spatial_merge_size=2
  num_position_embeddings=2304
glm4v_vision hidden_size=1536 intermediate_size=13696 image_size=336 patch_size=14 depth=24 num_heads=12
  hidden_act="silu" rms_norm_eps=1e-05
glm4v_moe_vision hidden_size=1536 intermediate_size=13696 image_size=336 patch_size=14 depth=24 num_heads=12
  hidden_act="silu" rms_norm_eps=1e-05
glm_ocr_vision hidden_size=1024 intermediate_size=4096 image_size=336 patch_size=14 depth=24 num_heads=16
  hidden_act="silu" rms_norm_eps=1e-05
siglip_vision_model hidden_size=768 intermediate_size=3072 image_size=224 patch_size=16 num_hidden_layers=12
  num_attention_heads=12 layer_norm_eps=1e-06
siglip2_vision_model hidden_size=768 intermediate_size=3072 patch_size=16 num_hidden_layers=12 num_attention_heads=12
  layer_norm_eps=1e-06
pixtral hidden_size=1024 intermediate_size=4096 image_size=1024 patch_size=16 num_hidden_layers=24
  num_attention_heads=16 hidden_act="gelu"
idefics3_vision hidden_size=1152 intermediate_size=3072 image_size=224 patch_size=32 num_hidden_layers=12
  num_attention_heads=16 layer_norm_eps=1e-06
smolvlm_vision hidden_size=1152 intermediate_size=3072 image_size=224 patch_size=32 num_hidden_layers=12
  num_attention_heads=16 layer_norm_eps=1e-06
llama4_vision_model hidden_size=768 intermediate_size=5632 image_size=448 patch_size=14 num_hidden_layers=34
  num_attention_heads=16 hidden_act="gelu" norm_eps=1e-05 pixel_shuffle_ratio=0.5
internvl_vision hidden_size=1024 intermediate_size=4096 image_size=[448,448] patch_size=[14,14] num_hidden_layers=24
  num_attention_heads=16 hidden_act="gelu" layer_norm_eps=1e-06
exaone4_5_vision hidden_size=3584 intermediate_size=3420 patch_size=14 depth=32 num_heads=16 num_key_value_heads=8
  window_size=112 fullatt_block_indexes=[7,15,23,31]
qwen2_5_omni_vision_encoder hidden_size=3584 intermediate_size=3420 patch_size=14 depth=32 num_heads=16
  fullatt_block_indexes=[7,15,23,31]
qwen2_5_omni_audio_encoder d_model=1280 encoder_ffn_dim=5120 encoder_attention_heads=20 encoder_layers=32
  num_mel_bins=128
qwen2_audio_encoder d_model=1280 encoder_ffn_dim=5120 encoder_attention_heads=20 encoder_layers=32 num_mel_bins=128
voxtral_encoder hidden_size=1280 intermediate_size=5120 num_hidden_layers=32 num_attention_heads=20 num_mel_bins=128
"""


@cache
def tower_defaults() -> dict[str, dict[str, Any]]:
    """Model type of a tower -> key -> default."""
    rows = _TABLE.replace("\n  ", " ").strip().splitlines()
    pairs = {kind: [item.split("=", 1) for item in items] for kind, *items in (row.split() for row in rows)}
    return {kind: {key: json.loads(value) for key, value in items} for kind, items in pairs.items()}


def with_defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of config.json with the defaults of its model type."""
    return {**tower_defaults().get(str(part.get("model_type") or ""), {}), **part}
