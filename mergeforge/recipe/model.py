"""What a recipe is made of, checked: models, slices, rules, adapters, outputs, and the Recipe itself."""

from __future__ import annotations

import re
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
    """An adapter with its weight and the method's other parameters for it.

    `base_is_residual`: the base is what PiSSA, OLoRA and the like left of the original.
    """

    adapter: ModelRef
    weight: Any = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base_is_residual: bool = False


@dataclass(frozen=True)
class ModelEntry:
    """A model, the adapters folded into it before anything else, and the method's parameters for it.

    `layers`: in a slice, the layers [first, stop) that it gives.
    """

    model: ModelRef
    adapters: tuple[AdapterEntry, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, int] | None = None

    def __str__(self) -> str:
        return "+".join([str(self.model), *(str(entry.adapter) for entry in self.adapters)])


@dataclass(frozen=True)
class Slice:
    """Layers of several models, merged, and stacked on those of the slices before it.

    `base`: the base model of this slice alone.
    """

    sources: tuple[ModelEntry, ...]
    base: ModelEntry | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A part of a model (text_decoder, vision_tower, encoder, ...) with models or slices of its own."""

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How the tensors whose names match are made; what it leaves out is as in the recipe around it.

    `match`: regular expressions, any of which is found in the name (none: every tensor). `use`: the
    model whose tensor is taken unchanged ("base": the base model's). `drop`: they are left out.
    """

    match: tuple[str, ...] = ()
    merge_method: str | None = None
    models: tuple[ModelEntry, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    use: ModelEntry | None = None
    drop: bool = False

    def matches(self, name: str) -> bool:
        return not self.match or any(re.search(pattern, name) for pattern in self.match)


@dataclass(frozen=True)
class TokenEntry:
    """Where a token's embedding comes from: a model's row for it, another token's row, or zeros.

    `kind`: "model" (the row that `model` has for it), "model_token" (its row for `token` or
    `token_id`) or "zero". `force`: for every model, also those that know the token.
    """

    kind: str
    model: ModelEntry | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerEntry:
    """The output's tokenizer: "union", "base" or a model's, tokens treated on their own, padding."""

    source: str | ModelEntry = "union"
    tokens: Mapping[str, TokenEntry | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


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
class AdapterOutput:
    """The adapters as one: all their ranks, or cut to `rank`, or to the `energy` share of the squared change."""

    rank: int | None = None
    energy: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Publish:
    """The Hub repo that the finished folder goes to; with `stream`, file by file while the merge goes on."""

    repo: str
    private: bool = True
    revision: str = "main"
    stream: bool = False


@dataclass(frozen=True)
class Output:
    """Where the result goes, in which formats, and how it is split: `shard_size` in bytes.

    `fp8`: linear weights are stored as FP8 (E4M3) with a scale for each block of 128 x 128.
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
    adapter: AdapterOutput | None = None
    publish: Publish | None = None
    fp8: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole merge, as the user wrote it; `raw` is the plain value that was read.

    `base_numerics`: what adapters are folded into: the tensors as stored, or as NF4 would hold them.
    `stream_inputs`: Hub repos are read where they lie, not downloaded.
    `stages`: the other documents of its file, whose results it may name as models. A `merge_method`
    of "" leaves every tensor to the rules.
    """

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
    name: str | None = None
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    rules: tuple[Rule, ...] = ()
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    base_numerics: str = "original"
    stream_inputs: bool = False
    stages: tuple[Recipe, ...] = ()

    @property
    def lists(self) -> list[tuple[ModelEntry, ...]]:
        """The models, as they are merged with one another: the recipe's, each slice's, each rule's."""
        parts: list[Recipe | Module] = [self, *self.modules]
        found = [list_ for part in parts for list_ in (part.models, *(one.sources for one in part.slices))]
        return [list_ for list_ in (*found, *(rule.models for rule in self.rules)) if list_]

    @property
    def entries(self) -> list[ModelEntry]:
        """Every model that the recipe names, but for its base model: each once, in its order."""
        slices = [*self.slices, *(one for module in self.modules for one in module.slices)]
        tokens = [one.model for one in self.tokenizer.tokens.values() if one] if self.tokenizer else []
        source = self.tokenizer.source if self.tokenizer else None
        others = [
            *(one.base for one in slices),
            *(rule.use for rule in self.rules if str(rule.use) != "base"),
            source if isinstance(source, ModelEntry) else None,
            *tokens,
        ]
        every = [entry for list_ in self.lists for entry in list_] + [entry for entry in others if entry]
        return list({str(entry): entry for entry in reversed(every)}.values())[::-1]

    @property
    def documents(self) -> list[Mapping[str, Any]]:
        """What was read: the stages, then the recipe itself."""
        return [*(stage.raw for stage in self.stages), self.raw]

    @property
    def method_name(self) -> str:
        """What the merge is called in a line: its method, or those of its rules."""
        rules = dict.fromkeys(rule.merge_method for rule in self.rules if rule.merge_method)
        return self.merge_method or "+".join(map(str, rules)) or "rules"

    def to_yaml(self) -> str:
        """YAML that reads back as this recipe."""
        return "---\n".join(_dumped(document) for document in self.documents)


def _dumped(document: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    if not _LINE_BREAKS & set(text):
        return text
    return yaml.safe_dump(dict(document), sort_keys=False)  # PyYAML does not escape these otherwise
