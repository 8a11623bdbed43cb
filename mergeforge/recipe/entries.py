"""What a recipe is made of, checked: models, adapters, outputs, and the Recipe itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_LINE_BREAKS = set("\r\x85\u2028\u2029\ufeff")
# What `dtype` and `out_dtype` may be, as mergekit spells them, and the safetensors name of each.
OUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class ModelRef:
    """A local path or Hub repo id, with an optional revision (Hub only)."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter with its weight and the method's other parameters for it."""

    adapter: ModelRef
    weight: Any = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """A model, the adapters folded into it before anything else, and the method's parameters for it."""

    model: ModelRef
    adapters: tuple[AdapterEntry, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "+".join([str(self.model), *(str(entry.adapter) for entry in self.adapters)])


@dataclass(frozen=True)
class GGUFEntry:
    """A GGUF file to write: its mix of types (`q4_k_m`, ...), and what changes that mix.

    `tensor_types`: (part of a GGUF tensor's name or regular expression, type), first match wins.
    `split_max_size`: largest sum of tensor bytes of one file; 0: one file.
    """

    type: str
    imatrix: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    split_max_size: int = 0


@dataclass(frozen=True)
class Output:
    """Where the result goes, in which formats, and how it is split: `shard_size` in bytes.

    `gguf_from` "stored": GGUF is made from values rounded as safetensors would hold them.
    `gguf_pre` overrides what the tokenizer's structure says of its pre-tokenizer. `name` is what the
    model is called in file names and metadata (default: the folder's name).
    """

    path: str | None = None
    safetensors: bool = True
    shard_size: int = 5 * 10**9
    gguf: tuple[GGUFEntry, ...] = ()
    gguf_from: str = "float32"
    gguf_pre: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole merge, as the user wrote it; `raw` is the plain value that was read."""

    merge_method: str
    base_model: ModelEntry | None
    models: tuple[ModelEntry, ...]
    adapters: tuple[AdapterEntry, ...]
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    random_seed: int
    output: Output
    raw: Mapping[str, Any]

    def to_yaml(self) -> str:
        """YAML that reads back as this recipe."""
        text = yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)
        if not _LINE_BREAKS & set(text):
            return text
        return yaml.safe_dump(dict(self.raw), sort_keys=False)  # PyYAML does not escape these otherwise
