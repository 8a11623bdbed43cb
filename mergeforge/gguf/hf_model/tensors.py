"""Names and shapes of a model's stored tensors, from those of its GGUF tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.hf_model.classes import TensorPattern
from mergeforge.gguf.hf_model.shapes import Shape, stored_shape

CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BLOCK = re.compile(r"\bblk\.(\d+)\.")


@dataclass(frozen=True)
class TensorLayout:
    """The stored tensors, the GGUF tensors that none of them becomes, and the patterns with and without a tensor."""

    tensors: Mapping[str, TensorInfo]
    unused: tuple[str, ...]
    found: frozenset[str]
    missing: frozenset[str]


def block_count(tensors: Mapping[str, Shape]) -> int:
    """One more than the highest number of a block."""
    return max((int(match[1]) for name in tensors if (match := _BLOCK.search(name))), default=-1) + 1


def lay_out_tensors(
    patterns: tuple[TensorPattern, ...], shapes: Mapping[str, Shape], layers: int, positions: int
) -> TensorLayout:
    """The stored tensors of a variant of a class.

    layers: num_hidden_layers; later blocks are {extra}. positions: max_position_embeddings.
    """
    extra = any("{extra}" in pattern.targets[0] for pattern in patterns)
    blocks = _Blocks(layers if extra else block_count(shapes), layers, block_count(shapes))
    tensors: dict[str, TensorInfo] = {}
    used: set[str] = set(CONSTANTS)
    found = set()
    for pattern in patterns:
        for name, targets in _instances(pattern, shapes, blocks):
            if all(target in shapes for target in targets):
                shape = stored_shape(pattern.form, [shapes[name] for name in targets])
                if pattern.form == "positions":
                    shape = (positions, *shape[1:])
                tensors[name] = TensorInfo(name, "F32", shape)
                used.update(targets)
                found.add(pattern.name)
    missing = frozenset(pattern.name for pattern in patterns if pattern.targets != ("output.weight",)) - found
    return TensorLayout(tensors, tuple(name for name in shapes if name not in used), frozenset(found), missing)


@dataclass(frozen=True)
class _Blocks:
    """Numbers of blocks: {block} stands for those below `end`, {extra} for those from `layers` to `count`."""

    end: int
    layers: int
    count: int


def _instances(pattern: TensorPattern, shapes: Mapping[str, Shape], blocks: _Blocks) -> Iterator[tuple[str, list[str]]]:
    """The tensors of a pattern, in every block and of every expert."""
    for name, targets in _in_blocks(pattern, blocks):
        if "{part}" in name and targets[0] in shapes:
            for part in range(shapes[targets[0]][0]):
                yield name.replace("{part}", str(part)), targets
        elif "{part}" not in name:
            yield name, targets


def _in_blocks(pattern: TensorPattern, blocks: _Blocks) -> Iterator[tuple[str, list[str]]]:
    if not any("{" in target for target in pattern.targets):
        yield pattern.name, list(pattern.targets)
    elif "{block}" in pattern.targets[0]:
        yield from (_numbered(pattern, "{block}", block, block) for block in range(blocks.end))
    else:
        several = "{extra}" in pattern.name
        last = blocks.count if several else min(blocks.count, blocks.layers + 1)
        yield from (_numbered(pattern, "{extra}", block - blocks.layers, block) for block in range(blocks.layers, last))


def _numbered(pattern: TensorPattern, field: str, number: int, block: int) -> tuple[str, list[str]]:
    return pattern.name.replace(field, str(number)), [target.replace(field, str(block)) for target in pattern.targets]
