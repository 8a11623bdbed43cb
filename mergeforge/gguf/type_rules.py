"""The type that llama-quantize gives to each tensor of a file type, and what a user sets instead.

The rules of src/llama-quant.cpp (llama_tensor_get_type), build b11549.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.gguf import low_bit_rules
from mergeforge.gguf.low_bit_rules import EMBEDDINGS, LOW_BIT
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType

if TYPE_CHECKING:
    from mergeforge.gguf.file_types import FileType

Shape = tuple[int, ...]  # slowest dimension first
_ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")

# What replaces a type whose block does not divide a tensor's columns; for types with blocks of 32, and if that does not
# fit, F16. llama-quantize has nothing for Q1_0 and NVFP4.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FALLBACKS |= dict.fromkeys(("Q2_0", "TQ1_0", "TQ2_0"), "Q4_0")
FALLBACKS |= dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")


@dataclass(frozen=True)
class ModelHparams:
    """The hyperparameters that the rules depend on; head counts are those of the first layer."""

    arch: str
    block_count: int
    expert_count: int = 0
    head_count: int = 0
    head_count_kv: int = 0

    @property
    def n_gqa(self) -> int:
        """Query heads per key/value head."""
        return self.head_count // self.head_count_kv if self.head_count_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp treats it as a 70B model: 80 layers in some families (68 in jais2)."""
        if self.arch == "llama":
            return self.block_count == 80 and self.head_count != self.head_count_kv
        return (self.arch, self.block_count) in {("qwen2", 80), ("olmo", 80), ("deci", 80), ("jais2", 68)}


@dataclass(frozen=True)
class TypeOverrides:
    """Types that the user sets, by their names in QUANT_TYPES, in upper or lower case.

    `tensor_types`: (regular expression, type) pairs. The first one that matches a part of a tensor's name takes
    precedence over the file type's rules, but not over `output` and `embedding`. `pure`: every matrix gets the file
    type's default type.
    """

    tensor_types: Sequence[tuple[str, str]] = ()
    output: str = ""
    embedding: str = ""
    pure: bool = False


NO_OVERRIDES = TypeOverrides()


def quant_type_named(name: str) -> QuantType:
    """The tensor type of a name in upper or lower case. Raises RecipeError."""
    if name.upper() not in QUANT_TYPES:
        hint = did_you_mean(name.upper(), QUANT_TYPES) or "one of " + ", ".join(QUANT_TYPES)
        raise RecipeError(f"unknown GGUF tensor type '{name}'", hint=hint)
    return QUANT_TYPES[name.upper()]


def layer_of(name: str) -> int:
    """The block that a tensor belongs to; -1 for tensors outside of blocks."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _more_bits(i: int, n: int) -> bool:
    """Whether layer i of n is in the first or last eighth, or every third in between (use_more_bits in llama.cpp)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass
class TensorTypeSelector:
    """Chooses types in llama-quantize's order of tensors, because some rules count the tensors before."""

    file_type: FileType
    model: ModelHparams
    has_imatrix: bool
    overrides: TypeOverrides
    names: frozenset[str]
    attention_v: int = 0
    ffn: Counter[str] = field(default_factory=Counter)
    patterns: list[tuple[re.Pattern[str], QuantType]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patterns = [(_pattern(text), quant_type_named(name)) for text, name in self.overrides.tensor_types]
        self.attention_vs = sum(any(part in name for part in _ATTENTION_V) for name in self.names)
        self.tied = "output.weight" not in self.names

    def select(self, name: str, shape: Shape) -> QuantType:
        columns = shape[-1]
        override = next((quant_type for pattern, quant_type in self.patterns if pattern.search(name)), None)
        if self.overrides.embedding and name in EMBEDDINGS and not (name == EMBEDDINGS[1] and override):
            return _require_fit(name, quant_type_named(self.overrides.embedding), columns)
        if self.overrides.output and name == "output.weight":
            return _require_fit(name, quant_type_named(self.overrides.output), columns)
        default = QUANT_TYPES[self.file_type.default_type]
        if override is None and (self.overrides.pure or default.block == 1):
            override = default
        return _with_fallback(name, override or QUANT_TYPES[self._by_rules(name, shape)], columns)

    def _by_rules(self, name: str, shape: Shape) -> str:
        """The type by the file type's rules."""
        label, default = self.file_type.label, self.file_type.default_type
        if name == "output.weight" or (self.tied and name in EMBEDDINGS):
            return self._output(shape[-1])
        if label == "MXFP4_MOE":
            return self._expert(name, shape)
        if name in EMBEDDINGS:
            return low_bit_rules.embedding_type(label, default)
        if any(part in name for part in _ATTENTION_V):
            self.attention_v += 1
            return self._attention_v(self.attention_v - 1)
        if "attn_k.weight" in name:
            return self._attention_k()
        if "attn_q.weight" in name:
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(label, default)
        if "attn_output.weight" in name:
            return self._attention_output()
        part = next((part for part in ("ffn_up", "ffn_gate", "ffn_down") if part in name), "")
        if not part:
            return default
        self.ffn[part] += 1
        if part == "ffn_down" and label in LOW_BIT:
            early = self.ffn[part] <= self.model.block_count // 8
            return low_bit_rules.ffn_down_type(label, default, early)
        if part == "ffn_down":
            return self._ffn_down(self._ffn_layer(name, part), self.model.block_count)
        return self._ffn_up(name, part, self.model.block_count)

    def _output(self, columns: int) -> str:
        if self.tied and self.overrides.output:
            return quant_type_named(self.overrides.output).name
        default = QUANT_TYPES[self.file_type.default_type]
        unfit = self.model.arch == "falcon" or columns % default.block
        if unfit or default.name == "Q8_0" or self.file_type.label == "MXFP4_MOE":
            return "Q8_0"
        return "Q5_K" if self.file_type.label in (*LOW_BIT, "IQ3_XXS") else "Q6_K"

    def _expert(self, name: str, shape: Shape) -> str:
        """The type in a MXFP4_MOE file: only stacks of experts get 4 bits."""
        matrices = shape[-3] if len(shape) > 2 else 1
        by_name = self.model.arch == "bailingmoe3"  # other matrices of it are stacked too
        is_expert = not by_name or any(part in name for part in ("ffn_up", "ffn_gate", "ffn_down"))
        return "MXFP4" if matrices > 1 and is_expert else "Q8_0"

    def _attention_k(self) -> str:
        label, default = self.file_type.label, self.file_type.default_type
        if self.model.expert_count == 8:
            return "Q4_K" if label in LOW_BIT else "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(label, default)

    def _attention_v(self, i: int) -> str:
        label, grouped = self.file_type.label, self.model.n_gqa >= 4
        type_name = self.file_type.default_type
        if label in LOW_BIT:
            return low_bit_rules.attention_v_type(label, grouped, self.model.expert_count)
        if label == "IQ3_M" or (label in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped):
            type_name = "Q4_K"
        elif label == "IQ3_XXS" and not self.has_imatrix:
            type_name = "IQ3_S"
        elif label == "Q2_K":
            type_name = "Q4_K" if grouped else "Q3_K"
        elif label == "Q3_K_M":
            type_name = "Q5_K" if i < 2 else "Q4_K"
        elif label == "Q3_K_L" or (label in ("IQ4_NL", "IQ4_XS") and grouped) or (label == "Q4_K_S" and i < 4):
            type_name = "Q5_K"
        elif label in ("Q4_K_M", "Q5_K_M") and _more_bits(i, self.attention_vs):
            type_name = "Q6_K"
        if self.model.is_70b and type_name in ("Q3_K", "Q4_K"):
            type_name = "Q5_K"
        return "Q8_0" if self.model.expert_count == 8 else type_name

    def _attention_output(self) -> str:
        label, default = self.file_type.label, self.file_type.default_type
        if label in LOW_BIT:
            return low_bit_rules.attention_output_type(label, default, self.model.expert_count)
        if self.model.arch == "falcon":
            return "Q4_K" if label == "Q3_K_L" else default
        if self.model.expert_count == 8:
            better = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if label in (*better, "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M") else default
        types = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
        return types.get(label, default)

    def _ffn_up(self, name: str, part: str, n: int) -> str:
        """The type of ffn_up and ffn_gate: in the layers between the first and last eighth, IQ3_XS has less bits."""
        if self.file_type.label != "IQ3_XS":
            return self.file_type.default_type
        return "IQ3_XXS" if n // 8 <= self._ffn_layer(name, part) < 7 * n // 8 else "IQ3_S"

    def _ffn_layer(self, name: str, part: str) -> int:
        """The layer of an ffn tensor: by counting, or by its name if experts give a layer more than one."""
        if self.model.expert_count <= 1:
            return self.ffn[part] - 1
        layer = layer_of(name)
        if not 0 <= layer < self.model.block_count:
            error = f"{name} is outside of the model's {self.model.block_count} layers"
            raise RecipeError(error, hint="choose f16 or q8_0")
        return layer

    def _ffn_down(self, i: int, n: int) -> str:
        label, falcon, default = self.file_type.label, self.model.arch == "falcon", self.file_type.default_type
        early, more = i < n // 8, _more_bits(i, n)
        if label == "Q2_K":
            return "Q3_K"
        if label == "IQ3_XXS" and not self.has_imatrix:
            return "Q4_K" if early else "Q3_K"
        if label == "Q2_K_S" or (label == "IQ3_M" and (early or (self.model.expert_count == 8 and more))):
            return "Q4_K" if early or label == "IQ3_M" else default
        if label == "Q3_K_M":
            return "Q5_K" if i < n // 16 else "Q4_K" if more or not falcon else "Q3_K"
        if label == "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        if label == "Q4_K_M" and falcon:
            return "Q6_K" if i < n // 16 else "Q5_K" if more else "Q4_K"
        if label in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more else default
        if early and label in ("IQ4_NL", "IQ4_XS") and not self.has_imatrix:
            return "Q5_K"
        if early and label == "Q4_K_S" and not falcon:
            return "Q5_K"
        if early and label in ("Q4_0", "Q5_0") and self.has_imatrix:
            return label.replace("_0", "_1")
        return default


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text.lower())  # in lower case, as llama-quantize does
    except re.error as error:
        hint = "write NAME=TYPE as in blk\\.0\\..*=q8_0"
        raise RecipeError(f"'{text}' is not a valid regular expression: {error}", hint=hint) from None


def _require_fit(name: str, quant_type: QuantType, columns: int) -> QuantType:
    """A type that is not replaced if it does not fit, because the user set it or nothing replaces it."""
    if columns % quant_type.block:
        error = f"{name} has {columns} columns, but {quant_type.name} needs a multiple of {quant_type.block}"
        raise RecipeError(error, hint="choose Q8_0 or F16")
    return quant_type


def _with_fallback(name: str, quant_type: QuantType, columns: int) -> QuantType:
    if columns % quant_type.block and quant_type.block > 32:
        if quant_type.name not in FALLBACKS:
            _require_fit(name, quant_type, columns)
        quant_type = QUANT_TYPES[FALLBACKS[quant_type.name]]
    return quant_type if columns % quant_type.block == 0 else QUANT_TYPES["F16"]
