"""A spelling carried out on whole tensors with numpy: what the GGUF file must hold, as plainly as can be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget
from mergeforge.gguf.key_values import Value
from support.gguf_models import Shapes, values

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
KINDS = {"u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "string": "STRING", "bool": "BOOL"}
Arrays = dict[str, np.ndarray]


def infos(shapes: Shapes, dtype: str = "float32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, DTYPES[dtype], tuple(shape)) for name, shape in shapes.items()}


def weights(shapes: Shapes) -> Arrays:
    return {name: values(name, tuple(shape)).numpy() for name, shape in shapes.items()}


def assembled(spelling: GGUFModelSpec, tensors: Mapping[str, TensorInfo], stored: Mapping[str, np.ndarray]) -> Arrays:
    """Every GGUF tensor, in float32; what no place fills is NaN."""
    flat: Arrays = {}
    shapes: Shapes = {}
    for name, places in spelling.targets.items():
        for place in places:
            shapes[place.tensor] = place.shape
            whole = flat.setdefault(place.tensor, np.full(int(np.prod(place.shape)), np.nan, dtype=np.float32))
            part = arranged(place, stored[name].reshape(tensors[name].rows, tensors[name].columns)).reshape(-1)
            start = place.first_row * place.shape[-1] + place.first_column
            whole[start : start + part.size] = part
    return {name: flat[name].reshape(shapes[name]) for name in flat} | dict(spelling.constants)


def arranged(place: TensorTarget, rows: np.ndarray) -> np.ndarray:
    if place.rows is not None:
        rows = rows[place.rows]
    if place.transpose:
        matrices = rows.reshape(-1, place.transpose, rows.shape[1])
        rows = matrices[:, :, place.columns or slice(None)].swapaxes(1, 2)
    if place.column_order is not None:
        rows = rows[:, place.column_order]
    if place.centered:
        rows = rows - torch.from_numpy(np.ascontiguousarray(rows)).mean().numpy()
    for factor in place.factors:
        rows = rows * np.float32(factor)
    rows = rows + np.float32(place.add) if place.add else rows
    # torch's exp, as in the converter: numpy's differs in the last bit
    return -torch.from_numpy(np.ascontiguousarray(rows)).exp().numpy() if place.negative_exp else rows


def typed(value: Value) -> tuple[tuple[str, ...], Any]:
    """A value as the gguf package's reader gives it."""
    if value.kind == "array":
        return ("ARRAY", KINDS[value.items]), list(value.value)
    return (KINDS[value.kind],), float(np.float32(value.value)) if value.kind == "f32" else value.value


def architecture_keys(keys: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The keys that a spelling decides, in order."""
    return {key: value for key, value in keys.items() if key.startswith(f"{arch}.") or key == "general.file_type"}


def spelled_keys(spelling: GGUFModelSpec) -> dict[str, Any]:
    return {key: typed(value) for key, value in architecture_keys(spelling.keys, spelling.arch).items()}


def kept(spelling: GGUFModelSpec) -> set[str]:
    """Tensors that stay F32 whatever the file's type."""
    return {place.tensor for places in spelling.targets.values() for place in places if place.f32} | {
        *spelling.constants
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]
