"""The original and diffusers' names of a UNet's modules (Stable Diffusion 1, 2 and XL).

Single-file checkpoints and kohya's SDXL adapters use the original's, other adapters and folders diffusers'.

The original numbers its blocks consecutively: an input block is one layer of diffusers' down blocks, or a
downsampler; an output block is one layer of the up blocks, the last one of a level with the upsampler
(diffusers, convert_ldm_unet_checkpoint).
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
_RESNETS = {original: name for name, original in _IN_RESNETS.items()}
_LAYER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)")
_RESIZE = re.compile(r"(?:down_blocks\.(\d+)\.downsamplers|up_blocks\.(\d+)\.upsamplers)\.0\.conv")


def ldm_names(modules: Collection[str], layers_per_block: int) -> dict[str, str]:
    """Original name -> diffusers' name, for the modules of a UNet with this layers_per_block."""
    with_attention = {match[1] for module in modules if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", module))}
    names = {module: _ldm_name(module, layers_per_block + 1, with_attention) for module in modules}
    return {name: module for module, name in names.items() if name}


def _ldm_name(module: str, blocks_per_level: int, with_attention: Collection[str]) -> str:
    """The original name of one module; "" if it has none.

    `blocks_per_level`: the original's blocks per block of diffusers; `with_attention`: up blocks with attentions.
    """
    if module in _FIXED:
        return _FIXED[module]
    if match := _RESIZE.fullmatch(module):
        if match[1]:
            return f"input_blocks.{(int(match[1]) + 1) * blocks_per_level}.0.op"
        last = (int(match[2]) + 1) * blocks_per_level - 1
        return f"output_blocks.{last}.{2 if match[2] in with_attention else 1}.conv"
    match = _LAYER.fullmatch(module)
    if match is None:
        return ""
    direction, block, kind, layer, rest = match.groups()
    slot, inner = int(kind == "attentions"), _IN_RESNETS.get(rest, "") if kind == "resnets" else rest
    if not inner:
        return ""
    if direction is None:
        return f"middle_block.{2 * int(layer) + slot}.{inner}"
    index = int(block) * blocks_per_level + int(layer)
    return (
        f"input_blocks.{index + 1}.{slot}.{inner}" if direction == "down" else f"output_blocks.{index}.{slot}.{inner}"
    )


def diffusers_names(modules: Collection[str]) -> dict[str, str]:
    """diffusers' name -> original name, for the modules of a UNet with the original names."""
    downsamplers = [int(match[1]) for module in modules if (match := re.match(r"input_blocks\.(\d+)\.0\.op$", module))]
    blocks_per_level = min(downsamplers, default=3)
    fixed = {original: name for name, original in _FIXED.items()}
    names = {module: fixed.get(module) or _diffusers_name(module, blocks_per_level) for module in modules}
    return {name: module for module, name in names.items() if name}


def _diffusers_name(module: str, blocks_per_level: int) -> str:
    """diffusers' name of one module; "" if it has none."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return ""
    direction, block, slot, rest = match.groups()
    kind, inner = ("resnets", _RESNETS[rest]) if rest in _RESNETS else ("attentions", rest)
    if direction is None:
        return f"mid_block.{kind}.{int(slot) // 2}.{inner}"
    level, layer = divmod(int(block) - (direction == "input"), blocks_per_level)
    if rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    return f"{'down' if direction == 'input' else 'up'}_blocks.{level}.{kind}.{layer}.{inner}"
