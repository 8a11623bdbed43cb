"""QuantGroupFinder: the stored tensors, the config's settings, and the quantized groups found so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.checkpoints.quantized.tensor import QuantizedTensor, QuantLayout
from mergeforge.core.tensor_info import DTYPES, FLOATS, TensorInfo
from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor

MAX_SMALL_NBYTES = 1 << 20  # bytes of a description, a shape, or the group numbers of a weight's inputs
USE_16_BIT = "use the 16-bit version of the model"


@dataclass
class QuantGroupFinder:
    """A checkpoint's stored tensors while the detectors look for quantized groups.

    `quant_config`: the quantization_config; `dtype`: the safetensors name of the dtype in the config, or "". `groups`:
    quantized tensors by the name of the stored tensor that they replace; `used`: the names of all tensors in groups.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    quant_config: Mapping[str, Any]
    dtype: str
    groups: dict[str, QuantizedTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def with_suffix(self, *suffixes: str) -> Iterator[tuple[str, StoredTensor]]:
        """Names (without the suffix) and tensors with one of the suffixes that are in no group yet."""
        for name, stored in self.tensors.items():
            for suffix in suffixes:
                if name.endswith(suffix) and name not in self.used:
                    yield name.removesuffix(suffix), stored

    def require(self, name: str, why: str) -> StoredTensor:
        """A tensor that a group needs; `why`: what needs it. Raises SourceError if it is missing or empty."""
        if name not in self.tensors:
            raise SourceError(f"{self.label} lacks {name}, which {why} needs", hint="download the checkpoint again")
        if not self.tensors[name].info.numel:
            raise self.error(name, "is empty")
        return self.tensors[name]

    def add_group(
        self, name: str, layout: QuantLayout, shape: tuple[int, ...], dtype: str, unread: tuple[str, ...] = ()
    ) -> None:
        """Record that stored tensors make up the tensor `name`; `unread`: tensors of the group that are not read."""
        names = tuple(stored.info.name for stored in layout.stored)
        self.groups[names[0]] = QuantizedTensor(TensorInfo(name, dtype, shape), layout)
        self.used.update(names, (unread_name for unread_name in unread if unread_name in self.tensors))

    def error(self, name: str, what: str) -> SourceError:
        """An error about a malformed or unsupported group."""
        return SourceError(f"{self.label}: {name} {what}", hint=USE_16_BIT)


def check_shape(finder: QuantGroupFinder, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raises SourceError unless a stored tensor has the shape."""
    if stored.info.shape != shape:
        raise finder.error(stored.info.name, f"has the shape {list(stored.info.shape)}, not {list(shape)}")


def read_small_tensor(stored: StoredTensor) -> bytes:
    """Read all bytes of a small tensor during planning. Raises SourceError for a large one."""
    if stored.info.nbytes > MAX_SMALL_NBYTES:
        raise SourceError(
            f"{stored.file.path}: {stored.info.name} has {stored.info.nbytes} bytes, more than {MAX_SMALL_NBYTES}"
        )
    raw = bytearray(stored.info.nbytes)
    stored.file.read_into(memoryview(raw), stored.offset)
    return bytes(raw)


def read_json_tensor(stored: StoredTensor) -> dict[str, Any]:
    """Read a JSON object that is stored as a tensor of bytes. Raises SourceError."""
    try:
        value = json.loads(read_small_tensor(stored).decode("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceError(
            f"{stored.file.path}: {stored.info.name} is not a JSON object", hint="download the checkpoint again"
        )
    return value


def quant_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config of a config or of its text_config; empty if there is none."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), Mapping):
                quant_config: Mapping[str, Any] = part[key]
                return quant_config
    return {}


def without_quant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without any quantization_config."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    inner = plain.get("text_config")
    if isinstance(inner, Mapping):
        plain["text_config"] = without_quant_config(inner)
    return plain


def config_dtype(config: Mapping[str, Any]) -> str:
    """The safetensors name of the float dtype in a config, or ""."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if name := float_dtype_name(part.get(key)):
                return name
    return ""


def float_dtype_name(value: Any) -> str:
    """The safetensors name of a torch float dtype, given by its name, or ""."""
    torch_name = str(value).removeprefix("torch.")
    return next((name for name, (_, known) in DTYPES.items() if known == torch_name and name in FLOATS), "")
