"""The names of a Flux transformer's modules in Black Forest Labs' files and in diffusers' folders, each in the other's.

The original fuses q, k and v of a block, and the MLP's first layer with them in single blocks; the halves of the last
modulation, shift and scale, are swapped in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.tensors.lazy import LazyTensor

Slices = tuple[LoadedSlice, ...]
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_INSIDE = {  # within a block: original -> diffusers', in the order of the rows
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),  # x-flux adapts these rows of linear1 alone
    "linear2": ("proj_out",),
}
_DOUBLE_ONLY = ("img_", "txt_")
_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_LAST_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")


def flux_aliases(weights: Mapping[str, LazyTensor]) -> dict[str, Slices]:
    """Module in the other layout's name -> the rows of stored weights that it is. `weights`: by module."""
    aliases: dict[str, Slices] = {}
    for original, names in (*_OUTSIDE.items(), *_inside_blocks(weights)):
        if fused := weights.get(original.removesuffix(".qkv") if original.endswith("linear1.qkv") else original):
            aliases |= _parts_of(fused, original, names)
        elif all(part in weights for part in names):
            aliases[original] = tuple(_concatenated([weights[part] for part in names]))
    for here, there in (_LAST_MODULATION, _LAST_MODULATION[::-1]):
        if here in weights:
            half = weights[here].info.shape[0] // 2
            stored = weights[here].info.name
            aliases[there] = (LoadedSlice(stored, half, half, 0), LoadedSlice(stored, half, 0, half))
    return aliases


def _inside_blocks(weights: Mapping[str, LazyTensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original, diffusers' names) of every module that a block of the model can have."""
    pattern = re.compile(r"((?:double|single)_blocks|(?:single_)?transformer_blocks)\.(\d+)\.")
    blocks = dict.fromkeys((match[1], match[2]) for module in weights if (match := pattern.match(module)))
    for name, number in blocks:
        original = next(own for own, theirs in _BLOCKS.items() if name in (own, theirs))
        for inner, names in _INSIDE.items():
            if inner.startswith(_DOUBLE_ONLY) == (original == "double_blocks"):
                prefix = f"{_BLOCKS[original]}.{number}"
                yield f"{original}.{number}.{inner}", tuple(f"{prefix}.{part}" for part in names)


def _parts_of(fused: LazyTensor, original: str, names: tuple[str, ...]) -> dict[str, Slices]:
    """The parts of a weight of the original: q, k and v have as many rows as it has columns, the MLP has the rest."""
    rows, columns = fused.info.shape[0], fused.info.columns
    if original.endswith("linear1.qkv"):
        return {original: (LoadedSlice(fused.info.name, 3 * columns),)}
    if len(names) == 1:
        return {names[0]: (LoadedSlice(fused.info.name, rows),)}
    sizes = [rows // 3] * 3 if len(names) == 3 else [columns, columns, columns, rows - 3 * columns]
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    places = zip(names, sizes, starts, strict=True)
    return {name: (LoadedSlice(fused.info.name, size, stored_start=start),) for name, size, start in places}


def _concatenated(parts: list[LazyTensor]) -> Iterator[LoadedSlice]:
    start = 0
    for part in parts:
        rows = part.info.shape[0]
        yield LoadedSlice(part.info.name, rows, loaded_start=start)
        start += rows
