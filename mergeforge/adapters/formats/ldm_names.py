"""The original names of a UNet's modules (Stable Diffusion 1, 2 and XL), which kohya's SDXL files speak of.

Its blocks are numbered through: an input block is one layer of diffusers' down blocks, or a downsampler; an
output block one layer of the up blocks, with the upsampler in the last (diffusers, convert_ldm_unet_checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Collection

_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)")
_RESIZE = re.compile(r"(?:down_blocks\.(\d+)\.downsamplers|up_blocks\.(\d+)\.upsamplers)\.0\.conv")


def ldm_names(modules: Collection[str], per_block: int) -> dict[str, str]:
    """Original name -> diffusers' for those of a UNet's modules that have one. `per_block`: its layers_per_block."""
    attentive = {found[1] for one in modules if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", one))}
    names = {module: _ldm_name(module, per_block + 1, attentive) for module in modules}
    return {name: module for module, name in names.items() if name}


def _ldm_name(module: str, step: int, attentive: Collection[str]) -> str:
    """`step`: the original's blocks for each of diffusers'; `attentive`: the up blocks with attentions."""
    if module in _FIXED:
        return _FIXED[module]
    if found := _RESIZE.fullmatch(module):
        if found[1]:
            return f"input_blocks.{(int(found[1]) + 1) * step}.0.op"
        return f"output_blocks.{int(found[2]) * step + step - 1}.{2 if found[2] in attentive else 1}.conv"
    found = _LAYER.fullmatch(module)
    if found is None:
        return ""
    way, block, kind, layer, rest = found.groups()
    place, inner = int(kind == "attentions"), _IN_RESNETS.get(rest, "") if kind == "resnets" else rest
    if not inner:
        return ""
    if way is None:
        return f"middle_block.{2 * int(layer) + place}.{inner}"
    at = int(block) * step + int(layer)
    return f"input_blocks.{at + 1}.{place}.{inner}" if way == "down" else f"output_blocks.{at}.{place}.{inner}"
