"""What recognising works on: the stored tensors, what the config says, and what has been recognised so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.checkpoints.quantized.tensor import Packing, QuantizedTensor
from mergeforge.core.tensor_info import DTYPES, FLOATS, TensorInfo
from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor

LARGEST = 1 << 20  # bytes of a description, of a shape, or of the groups of a weight's inputs
SIXTEEN_BIT = "give the 16-bit version of the model"


@dataclass
class Held:
    """A checkpoint's stored tensors while its quantised groups are looked for.

    `settings`: the quantization_config; `dtype`: the safetensors name of the dtype that the config says, or
    "". `found`: ways by the name of the stored tensor whose place they take; `used`: every name that is spoken for.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    dtype: str
    found: dict[str, QuantizedTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def ending(self, *ends: str) -> Iterator[tuple[str, StoredTensor]]:
        """Names (without their end) and tensors that end so, and that nothing has recognised yet."""
        for name, stored in self.tensors.items():
            for end in ends:
                if name.endswith(end) and name not in self.used:
                    yield name.removesuffix(end), stored

    def wants(self, name: str, why: str) -> StoredTensor:
        """A tensor that a group must have. Raises SourceError."""
        if name not in self.tensors:
            raise SourceError(f"{self.label} lacks {name}, which {why} needs", hint="download it again")
        if not self.tensors[name].info.numel:
            raise self.refuse(name, "is empty")
        return self.tensors[name]

    def put(self, name: str, packing: Packing, shape: tuple[int, ...], dtype: str, also: tuple[str, ...] = ()) -> None:
        """Note that stored tensors are the tensor `name`; `also` belongs to them and is not read."""
        names = tuple(one.info.name for one in packing.stored)
        self.found[names[0]] = QuantizedTensor(TensorInfo(name, dtype, shape), packing)
        self.used.update(names, (one for one in also if one in self.tensors))

    def refuse(self, name: str, what: str) -> SourceError:
        """An error about a group that is not as it should be."""
        return SourceError(f"{self.label}: {name} {what}", hint=SIXTEEN_BIT)


def shape_check(held: Held, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raises SourceError unless a stored tensor has the shape."""
    if stored.info.shape != shape:
        raise held.refuse(stored.info.name, f"has the shape {list(stored.info.shape)}, not {list(shape)}")


def numbers(stored: StoredTensor) -> bytes:
    """All bytes of a small tensor, read while planning. Raises SourceError for a large one."""
    if stored.info.nbytes > LARGEST:
        raise SourceError(f"{stored.file.path}: {stored.info.name} has {stored.info.nbytes} bytes, far too many")
    raw = bytearray(stored.info.nbytes)
    stored.file.read_into(memoryview(raw), stored.offset)
    return bytes(raw)


def description(stored: StoredTensor) -> dict[str, Any]:
    """A JSON object that is stored as a tensor of bytes. Raises SourceError."""
    try:
        value = json.loads(numbers(stored).decode("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{stored.file.path}: {stored.info.name} is not a JSON object", hint="download it again")
    return value


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's quantization_config, its own or its text_config's; empty where there is none."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), Mapping):
                found: Mapping[str, Any] = part[key]
                return found
    return {}


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without any quantization_config."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    inner = kept.get("text_config")
    if isinstance(inner, Mapping):
        kept["text_config"] = without_settings(inner)
    return kept


def dtype_of(config: Mapping[str, Any]) -> str:
    """The safetensors name of the float dtype that a config says, or ""."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if name := dtype_named(part.get(key)):
                return name
    return ""


def dtype_named(value: Any) -> str:
    """The safetensors name of torch's float dtype of this name, or ""."""
    wanted = str(value).removeprefix("torch.")
    return next((name for name, (_, known) in DTYPES.items() if known == wanted and name in FLOATS), "")
