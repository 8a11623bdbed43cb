"""GGUF file types, and the type that each tensor of a file gets.

The file types of llama.cpp's converter (f32, f16, bf16, q8_0) give every matrix one type and keep small and sensitive
tensors in F32. All others are llama-quantize's. They start from a file of the converter, give better types to the
tensors that matter most, and leave some tensors in the type that they have in that file (`source`). llama-quantize
counts tensors in an order of its own, so the types of a whole model are chosen together here too. The rules are those
of src/llama-quant.cpp, build b11549.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from mergeforge.core.registry import Registry
from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType

Shape = tuple[int, ...]  # slowest dimension first


@dataclass(frozen=True)
class FileType:
    """A file type (llama_ftype): label, general.file_type, the type of most tensors, and whose rules it follows."""

    label: str
    number: int
    default_type: str
    by_llama_quantize: bool = True  # else by the converter


# By the label in lower case; the converter's come first. A module of mergeforge.gguf.quantize may register more.
FILE_TYPES: Registry[FileType] = Registry(
    "GGUF type", "mergeforge.gguf.quantize", order=lambda file_type: file_type.by_llama_quantize
)


def register_file_type(file_type: FileType) -> FileType:
    """Make a file type available by its label in lower case."""
    return FILE_TYPES.add(file_type.label.lower(), file_type)


for _file_type in (
    FileType("F32", 0, "F32", by_llama_quantize=False),
    FileType("F16", 1, "F16", by_llama_quantize=False),
    FileType("BF16", 32, "BF16", by_llama_quantize=False),
    FileType("Q8_0", 7, "Q8_0", by_llama_quantize=False),
    FileType("Q4_0", 2, "Q4_0"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q2_K", 10, "Q2_K"),
    FileType("Q3_K_S", 11, "Q3_K"),
    FileType("Q3_K_M", 12, "Q3_K"),
    FileType("Q3_K_L", 13, "Q3_K"),
    FileType("Q4_K_S", 14, "Q4_K"),
    FileType("Q4_K_M", 15, "Q4_K"),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_K_M", 17, "Q5_K"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("IQ4_NL", 25, "IQ4_NL"),
    FileType("IQ4_XS", 30, "IQ4_XS"),
):
    register_file_type(_file_type)
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


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

# What replaces a type whose block does not divide a tensor's columns; for other types, and if that does not fit, F16.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

# Tensors that the converter always writes in F32.
_F32_NAMES = re.compile(
    r"""(position_embd|token_types|[va]\.position_embd|posnet\.\d+\.norm[12]
    |blk\.\d+\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d(_[qkv])?|shortconv\.conv|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)
    |altup_(correct|predict)_coef|indexer\.proj))\.weight""",
    re.VERBOSE,
)

# llama-quantize leaves a tensor unchanged if its name contains one of these parts, or is one of these names.
# fmt: off
_UNCHANGED_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight",
    "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd",
    "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)
# fmt: on
_UNCHANGED_NAMES = ("position_embd.weight", "token_types.weight")

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


def file_type_named(name: str) -> FileType:
    """The file type of a name or alias, in upper or lower case. Raises RecipeError."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in FILE_TYPES:
        hint = did_you_mean(key, [*FILE_TYPES, *ALIASES]) or "one of " + ", ".join(FILE_TYPES)
        raise RecipeError(f"unknown GGUF type '{name}'", hint=hint)
    return FILE_TYPES[key]


def quant_type_named(name: str) -> QuantType:
    """The tensor type of a name in upper or lower case. Raises RecipeError."""
    if name.upper() not in QUANT_TYPES:
        hint = did_you_mean(name.upper(), QUANT_TYPES) or "one of " + ", ".join(QUANT_TYPES)
        raise RecipeError(f"unknown GGUF tensor type '{name}'", hint=hint)
    return QUANT_TYPES[name.upper()]


def file_order(names: Sequence[str]) -> list[str]:
    """Names in llama-quantize's order: tensors outside of blocks, then block by block, each sorted by name as bytes."""
    return sorted(names, key=lambda name: (_layer(name), name.encode()))


def select_tensor_types(
    file_type: FileType,
    tensors: Mapping[str, Shape],
    model: ModelHparams,
    *,
    has_imatrix: bool = False,
    overrides: TypeOverrides = NO_OVERRIDES,
    source: str = "f32",
    f32: Container[str] = (),
) -> dict[str, QuantType]:
    """The type of every tensor, in the order of `tensors`.

    Raises RecipeError for types that are unknown or do not fit the columns of the tensor they are set for.

    Args:
        tensors: GGUF names and shapes, slowest dimension first.
        has_imatrix: whether there is an imatrix. llama-quantize does not check which tensors it covers.
        source: the converter's file type (f32, f16 or bf16) that llama-quantize would read.
        f32: tensors that the converter keeps in F32 for this family, besides those that it always does.
    """
    start = file_type if not file_type.by_llama_quantize else file_type_named(source)
    types = {name: _converter_type(start, name, shape, f32) for name, shape in tensors.items()}
    if file_type.by_llama_quantize or overrides != NO_OVERRIDES:
        selector = _TensorTypeSelector(file_type, model, has_imatrix, overrides, frozenset(tensors))
        for name in file_order(list(tensors)):
            stays_f32 = not file_type.by_llama_quantize and types[name].name == "F32" != file_type.default_type
            if _is_quantized(name, tensors[name]) and not stays_f32:
                types[name] = selector.select(name, tensors[name][-1])
    return types


def select_requantized_types(
    file_type: FileType,
    tensors: Mapping[str, Shape],
    model: ModelHparams,
    *,
    has_imatrix: bool = False,
    overrides: TypeOverrides = NO_OVERRIDES,
) -> dict[str, QuantType]:
    """The types that llama-quantize gives to the tensors of a GGUF file; tensors that keep theirs are absent.

    Raises RecipeError as select_tensor_types() does.

    Args:
        tensors: names and shapes in the order in which llama-quantize writes them, because its rules count.
    """
    selector = _TensorTypeSelector(file_type, model, has_imatrix, overrides, frozenset(tensors))
    return {name: selector.select(name, shape[-1]) for name, shape in tensors.items() if _is_quantized(name, shape)}


def _converter_type(file_type: FileType, name: str, shape: Shape, f32: Container[str]) -> QuantType:
    """The type that the converter gives a tensor."""
    is_small = len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith((".weight", ".lora_a", ".lora_b"))
    if is_small or name in f32 or _F32_NAMES.fullmatch(name):
        return QUANT_TYPES["F32"]
    quant_type = QUANT_TYPES[file_type.default_type]
    return quant_type if shape[-1] % quant_type.block == 0 else QUANT_TYPES["F16"]


def _is_quantized(name: str, shape: Shape) -> bool:
    """Whether llama-quantize changes the type of a tensor at all."""
    leading = [size for size in shape[:-1] if size != 1]
    return (
        bool(leading)
        and name.endswith("weight")
        and name not in _UNCHANGED_NAMES
        and not any(part in name for part in _UNCHANGED_PARTS)
    )


def _layer(name: str) -> int:
    """The block that a tensor belongs to; -1 for tensors outside of blocks."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _more_bits(i: int, n: int) -> bool:
    """Whether layer i of n is in the first or last eighth, or every third in between (use_more_bits in llama.cpp)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass
class _TensorTypeSelector:
    """Chooses types in llama-quantize's order of tensors, because some rules count the tensors before."""

    file_type: FileType
    model: ModelHparams
    has_imatrix: bool
    overrides: TypeOverrides
    names: frozenset[str]
    attention_v: int = 0
    ffn_down: int = 0
    patterns: list[tuple[re.Pattern[str], QuantType]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patterns = [(_pattern(text), quant_type_named(name)) for text, name in self.overrides.tensor_types]
        self.attention_vs = sum(any(part in name for part in _ATTENTION_V) for name in self.names)
        self.tied = "output.weight" not in self.names

    def select(self, name: str, columns: int) -> QuantType:
        override = next((quant_type for pattern, quant_type in self.patterns if pattern.search(name)), None)
        if self.overrides.embedding and name in _EMBEDDINGS and not (name == _EMBEDDINGS[1] and override):
            return _require_fit(name, quant_type_named(self.overrides.embedding), columns)
        if self.overrides.output and name == "output.weight":
            return _require_fit(name, quant_type_named(self.overrides.output), columns)
        default = QUANT_TYPES[self.file_type.default_type]
        if override is None and (self.overrides.pure or default.block == 1):
            override = default
        return _with_fallback(override or QUANT_TYPES[self._by_rules(name, columns)], columns)

    def _by_rules(self, name: str, columns: int) -> str:
        """The type by the file type's rules."""
        default = self.file_type.default_type
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            return self._output(columns)
        if name in _EMBEDDINGS:
            return default
        if any(part in name for part in _ATTENTION_V):
            self.attention_v += 1
            return self._attention_v(self.attention_v - 1)
        if "attn_k.weight" in name:
            return "Q8_0" if self.model.expert_count == 8 else default
        if "attn_q.weight" in name:
            return default
        if "attn_output.weight" in name:
            return self._attention_output()
        if "ffn_up" in name or "ffn_gate" in name or "ffn_down" not in name:
            return default
        self.ffn_down += 1
        return self._ffn_down(self._ffn_layer(name), self.model.block_count)

    def _output(self, columns: int) -> str:
        if self.tied and self.overrides.output:
            return quant_type_named(self.overrides.output).name
        default = QUANT_TYPES[self.file_type.default_type]
        return "Q8_0" if default.name == "Q8_0" or self.model.arch == "falcon" or columns % default.block else "Q6_K"

    def _attention_v(self, i: int) -> str:
        label, grouped = self.file_type.label, self.model.n_gqa >= 4
        type_name = self.file_type.default_type
        if label == "Q2_K":
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
        label = self.file_type.label
        if self.model.arch == "falcon":
            return "Q4_K" if label == "Q3_K_L" else self.file_type.default_type
        if self.model.expert_count == 8:
            better = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if label in better else self.file_type.default_type
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(label, self.file_type.default_type)

    def _ffn_layer(self, name: str) -> int:
        """The layer of an ffn_down tensor: by counting, or by its name if experts give a layer more than one."""
        if self.model.expert_count <= 1:
            return self.ffn_down - 1
        layer = _layer(name)
        if not 0 <= layer < self.model.block_count:
            error = f"{name} is outside of the model's {self.model.block_count} layers"
            raise RecipeError(error, hint="choose f16 or q8_0")
        return layer

    def _ffn_down(self, i: int, n: int) -> str:
        label, falcon, default = self.file_type.label, self.model.arch == "falcon", self.file_type.default_type
        early, more = i < n // 8, _more_bits(i, n)
        if label == "Q2_K":
            return "Q3_K"
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
    """A type that the user set for the embedding or the output; it is not replaced if it does not fit."""
    if columns % quant_type.block:
        error = f"{name} has {columns} columns, but {quant_type.name} needs a multiple of {quant_type.block}"
        raise RecipeError(error, hint="choose Q8_0 or F16")
    return quant_type


def _with_fallback(quant_type: QuantType, columns: int) -> QuantType:
    if columns % quant_type.block:
        quant_type = QUANT_TYPES[FALLBACKS.get(quant_type.name, quant_type.name)]
    return quant_type if columns % quant_type.block == 0 else QUANT_TYPES["F16"]
