"""What files of 2023 have otherwise: single experts, computed tables, and a key for linear rope scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.hf_model.shapes import Shape
from mergeforge.gguf.key_values import Value, string
from mergeforge.gguf.reader import GGUFTensorInfo

_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|down|up))\.(\d+)\.weight")
_COMPUTED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
_SCALE = "rope.scale_linear"
Sources = Mapping[str, GGUFTensorInfo]


def modern_shapes(tensors: Sources) -> dict[str, Shape]:
    """The shapes of all tensors, as a file of today has them: experts stacked. Raises SourceError."""
    shapes: dict[str, Shape] = {}
    experts: dict[str, dict[int, Shape]] = {}
    for name, stored in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}_exps.weight", {})[int(match[2])] = stored.shape
        elif not _COMPUTED.fullmatch(name):
            shapes[name] = stored.shape
    return shapes | {name: _stacked(name, parts) for name, parts in experts.items()}


def modern_keys(arch: str, keys: Mapping[str, Value]) -> Mapping[str, Value]:
    """The keys, with rope.scale_linear as rope.scaling.type and rope.scaling.factor."""
    scale = keys.get(f"{arch}.{_SCALE}")
    if scale is None:
        return keys
    others = {key: value for key, value in keys.items() if key != f"{arch}.{_SCALE}"}
    new = {f"{arch}.rope.scaling.type": string("linear"), f"{arch}.rope.scaling.factor": scale}
    return (new | others) if scale.value != 1 else others


def source_of(target: TensorTarget, tensors: Sources) -> tuple[TensorTarget, GGUFTensorInfo]:
    """The tensor that a target is in, and where in it."""
    if target.tensor in tensors:
        return target, tensors[target.tensor]
    expert = target.first_row * target.shape[-1] // math.prod(target.shape[1:])
    name = target.tensor.replace("_exps.weight", f".{expert}.weight")
    return replace(target, tensor=name, shape=target.shape[1:], first_row=0), tensors[name]


def _stacked(name: str, parts: Mapping[int, Shape]) -> Shape:
    if sorted(parts) != list(range(len(parts))) or len(set(parts.values())) > 1:
        raise SourceError(f"the experts of {name} are incomplete or differ in shape", hint="download the file again")
    return (len(parts), *parts[0])
