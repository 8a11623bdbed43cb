"""The parts of a validated recipe: models, slices, rules, adapters, outputs, and the Recipe itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_LINE_BREAKS = set("\r\x85\u2028\u2029\ufeff")
# The values of `dtype` and `out_dtype`, as mergekit spells them, and the safetensors name of each.
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

    `base_is_residual`: the base is the residual model that PiSSA, OLoRA or a similar initialization saved.
    """

    adapter: ModelRef
    weight: Any = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base_is_residual: bool = False


@dataclass(frozen=True)
class ModelEntry:
    """A model, the adapters folded into it first, and the method's parameters for it.

    `layers`: in a slice, the layers [first, stop) that it contributes.
    """

    model: ModelRef
    adapters: tuple[AdapterEntry, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, int] | None = None

    def __str__(self) -> str:
        return "+".join([str(self.model), *(str(entry.adapter) for entry in self.adapters)])


@dataclass(frozen=True)
class Slice:
    """Merged layers of several models, stacked on the layers of the slices before.

    `base`: the base model of this slice only.
    """

    sources: tuple[ModelEntry, ...]
    base: ModelEntry | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleEntry:
    """A part of a model (text_decoder, vision_tower, encoder, ...) with its own models or slices."""

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How to merge the tensors whose names match; keys that it omits come from the recipe.

    `match`: regular expressions, one of which is found in the name (none: every tensor). `use`: copy the
    tensor of this model unchanged ("base": the base model's). `drop`: leave the tensors out.
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
    `token_id`) or "zero". `force`: for every model, even one that has the token.
    """

    kind: str
    model: ModelEntry | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerEntry:
    """The output's tokenizer: "union", "base" or a model's; settings of single tokens; padding."""

    source: str | ModelEntry = "union"
    tokens: Mapping[str, TokenEntry | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class GGUFEntry:
    """A GGUF file to write: its file type (`q4_k_m`, ...) and overrides for single tensors.

    `tensor_types`: (substring of a GGUF tensor's name or regular expression, type), first match wins.
    `split_max_size`: maximum sum of tensor bytes of one file; 0: one file.
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
    """The adapters combined into one: at full rank, or cut to `rank` or to the `energy` share of the squared change."""

    rank: int | None = None
    energy: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Publish:
    """The Hub repo to upload the finished folder to; with `stream`, file by file while the merge runs."""

    repo: str
    private: bool = True
    revision: str = "main"
    stream: bool = False


@dataclass(frozen=True)
class Output:
    """Where the result is written, in which formats, and how it is split: `shard_size` in bytes.

    `fp8`: linear weights are stored as FP8 (E4M3) with a scale for each block of 128 x 128.
    `gguf_from` "stored": GGUF is quantized from values rounded to the safetensors dtype.
    `gguf_pre` overrides the pre-tokenizer that the tokenizer's structure implies. `mmproj`: the type of the GGUF file
    with the model's vision and audio towers. `converter`: "official" or a llama.cpp tree, whose converter then writes
    the model's GGUF files. `name` is the model's name in file names and metadata (default: the
    folder's name).
    """

    path: str | None = None
    safetensors: bool = True
    shard_size: int = 5 * 10**9
    gguf: tuple[GGUFEntry, ...] = ()
    gguf_from: str = "float32"
    gguf_pre: str | None = None
    mmproj: str | None = None
    converter: str | None = None
    name: str | None = None
    adapter: AdapterOutput | None = None
    publish: Publish | None = None
    fp8: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole merge, as the user wrote it; `raw` is the plain value that was read.

    `notes`: what the user should know about it, such as warnings of parameters without effect.
    `base_numerics`: what adapters are folded into: the tensors as stored, or rounded to NF4. `allow_mismatch`: merge
    models that contradict each other. `stream_inputs`: read Hub repos remotely instead of downloading them.
    `stages`: the other documents of its file, whose results it may name as models. A `merge_method` of "" leaves every
    tensor to the rules.
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
    modules: tuple[ModuleEntry, ...] = ()
    rules: tuple[Rule, ...] = ()
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    base_numerics: str = "original"
    stream_inputs: bool = False
    allow_mismatch: bool = False
    stages: tuple[Recipe, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def only_adapters(self) -> bool:
        """Whether there are adapters and no models: their base model may then be left out."""
        return bool(self.adapters) and not self.model_lists

    @property
    def model_lists(self) -> list[tuple[ModelEntry, ...]]:
        """Every list of models that are merged with one another: the recipe's, each slice's, each rule's."""
        parts: list[Recipe | ModuleEntry] = [self, *self.modules]
        lists = [models for part in parts for models in (part.models, *(slice_.sources for slice_ in part.slices))]
        return [models for models in (*lists, *(rule.models for rule in self.rules)) if models]

    @property
    def named_models(self) -> list[ModelEntry]:
        """Every model that the recipe names, except its base model: each once, in order."""
        slices = [*self.slices, *(slice_ for module in self.modules for slice_ in module.slices)]
        tokens = [token.model for token in self.tokenizer.tokens.values() if token] if self.tokenizer else []
        source = self.tokenizer.source if self.tokenizer else None
        further = [
            *(slice_.base for slice_ in slices),
            *(rule.use for rule in self.rules if str(rule.use) != "base"),
            source if isinstance(source, ModelEntry) else None,
            *tokens,
        ]
        entries = [entry for models in self.model_lists for entry in models] + [entry for entry in further if entry]
        return list({str(entry): entry for entry in reversed(entries)}.values())[::-1]

    @property
    def documents(self) -> list[Mapping[str, Any]]:
        """The plain values of the stages, then of the recipe itself."""
        return [*(stage.raw for stage in self.stages), self.raw]

    @property
    def method_name(self) -> str:
        """The merge in one word: its method, or the methods of its rules."""
        rules = dict.fromkeys(rule.merge_method for rule in self.rules if rule.merge_method)
        return self.merge_method or "+".join(map(str, rules)) or "rules"

    def to_yaml(self) -> str:
        """YAML that read() turns into this recipe again."""
        return "---\n".join(to_yaml(document) for document in self.documents)


def to_yaml(document: Mapping[str, Any]) -> str:
    """One document of a recipe as YAML."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    if not _LINE_BREAKS & set(text):
        return text
    return yaml.safe_dump(dict(document), sort_keys=False)  # PyYAML does not escape these otherwise
