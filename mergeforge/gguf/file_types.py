"""Which tensor of a GGUF file gets which type: F16 or Q8_0 as the converter writes it, Q4_K_M as llama-quantize does.

A mix is named as users name it ("q4_k_m"). The converter's mixes (f32, f16, bf16, q8_0) give every matrix one
type and keep in F32 what is small and sensitive. All others are llama-quantize's: they start from a file of the
converter, leave out what must not be quantised (it keeps the type that it has in that file, `source`), and give the
tensors that matter most a better type. llama-quantize counts tensors while it goes through them in an order of its
own, so here, too, the types of a whole model are chosen at once. The rules are those of
src/llama-quant.cpp, build b11549.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType

Shape = tuple[int, ...]  # slowest dimension first


@dataclass(frozen=True)
class FileType:
    """A file type: its label, its number as general.file_type, most tensors' type, and whose rules make it."""

    label: str
    file_type: int
    default: str
    quantizer: bool = True  # llama-quantize's; else the converter's


FILE_TYPES: Mapping[str, FileType] = {
    "f32": FileType("F32", 0, "F32", quantizer=False),
    "f16": FileType("F16", 1, "F16", quantizer=False),
    "bf16": FileType("BF16", 32, "BF16", quantizer=False),
    "q8_0": FileType("Q8_0", 7, "Q8_0", quantizer=False),
    "q4_0": FileType("Q4_0", 2, "Q4_0"),
    "q4_1": FileType("Q4_1", 3, "Q4_1"),
    "q5_0": FileType("Q5_0", 8, "Q5_0"),
    "q5_1": FileType("Q5_1", 9, "Q5_1"),
    "q2_k": FileType("Q2_K", 10, "Q2_K"),
    "q3_k_s": FileType("Q3_K_S", 11, "Q3_K"),
    "q3_k_m": FileType("Q3_K_M", 12, "Q3_K"),
    "q3_k_l": FileType("Q3_K_L", 13, "Q3_K"),
    "q4_k_s": FileType("Q4_K_S", 14, "Q4_K"),
    "q4_k_m": FileType("Q4_K_M", 15, "Q4_K"),
    "q5_k_s": FileType("Q5_K_S", 16, "Q5_K"),
    "q5_k_m": FileType("Q5_K_M", 17, "Q5_K"),
    "q6_k": FileType("Q6_K", 18, "Q6_K"),
    "iq4_nl": FileType("IQ4_NL", 25, "IQ4_NL"),
    "iq4_xs": FileType("IQ4_XS", 30, "IQ4_XS"),
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


@dataclass(frozen=True)
class FileTypeFacts:
    """What the choice needs to know of a model; head counts are the first layer's."""

    arch: str
    block_count: int
    expert_count: int = 0
    head_count: int = 0
    head_count_kv: int = 0

    @property
    def queries_a_key(self) -> int:
        return self.head_count // self.head_count_kv if self.head_count_kv else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp takes for a 70B model: 80 layers of some families (jais2: 68)."""
        if self.arch == "llama":
            return self.block_count == 80 and self.head_count != self.head_count_kv
        return (self.arch, self.block_count) in {("qwen2", 80), ("olmo", 80), ("deci", 80), ("jais2", 68)}


@dataclass(frozen=True)
class TypeOverrides:
    """What a user asks for besides the mix; all types by their names in QUANT_TYPES, in any case.

    `overrides`: (regular expression, type) pairs; the first that is found in a tensor's name wins, before the
    mix's rules, not before `output` and `embedding`. `pure`: every matrix gets the mix's default type.
    """

    overrides: Sequence[tuple[str, str]] = ()
    output: str = ""
    embedding: str = ""
    pure: bool = False


NO_WISHES = TypeOverrides()

# Falling back when a tensor's columns are no multiple of 256; then, or for the others, F16 if none of 32.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

# In F32 whatever the converter's output type is.
_F32_NAMES = re.compile(
    r"""(position_embd|token_types|[va]\.position_embd|posnet\.\d+\.norm[12]
    |blk\.\d+\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d(_[qkv])?|shortconv\.conv|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)
    |altup_(correct|predict)_coef|indexer\.proj))\.weight""",
    re.VERBOSE,
)

# llama-quantize leaves a tensor as it is when its name contains one of these, or is one of these.
# fmt: off
_LEFT_PARTS = (
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
_LEFT_NAMES = ("position_embd.weight", "token_types.weight")

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


def file_type_named(name: str) -> FileType:
    """The mix of a user's name for it. Raises RecipeError."""
    key = name.lower()
    mix = FILE_TYPES.get(ALIASES.get(key, key))
    if mix is None:
        hint = did_you_mean(key, [*FILE_TYPES, *ALIASES]) or "one of " + ", ".join(FILE_TYPES)
        raise RecipeError(f"unknown GGUF type '{name}'", hint=hint)
    return mix


def type_named(name: str) -> QuantType:
    """The tensor type of a user's name for it. Raises RecipeError."""
    kind = QUANT_TYPES.get(name.upper())
    if kind is None:
        hint = did_you_mean(name.upper(), QUANT_TYPES) or "one of " + ", ".join(QUANT_TYPES)
        raise RecipeError(f"unknown GGUF tensor type '{name}'", hint=hint)
    return kind


def file_order(names: Sequence[str]) -> list[str]:
    """llama-quantize's order of tensors: those outside of blocks by name, then block by block, by name (as bytes)."""
    return sorted(names, key=lambda name: (_layer(name, -1), name.encode()))


def select_tensor_types(
    mix: FileType,
    tensors: Mapping[str, Shape],
    model: FileTypeFacts,
    *,
    has_importance: bool = False,
    wishes: TypeOverrides = NO_WISHES,
    source: str = "f32",
    f32: Container[str] = (),
) -> dict[str, QuantType]:
    """The type of every tensor, in the order of `tensors`.

    Raises RecipeError for types that are unknown or do not fit the columns they are wished for.

    Args:
        tensors: GGUF names and shapes, slowest dimension first.
        has_importance: whether an imatrix is given (for whichever tensors; llama-quantize looks no closer).
        source: the converter's mix (f32, f16 or bf16) that llama-quantize would read.
        f32: tensors that the converter keeps in F32 for this family, besides those that it always does.
    """
    start = mix if not mix.quantizer else file_type_named(source)
    types = {name: _converted(start, name, shape, f32) for name, shape in tensors.items()}
    if mix.quantizer or wishes != NO_WISHES:
        state = _Walk(mix, model, has_importance, wishes, frozenset(tensors))
        for name in file_order(list(tensors)):
            kept = not mix.quantizer and types[name].name == "F32" != mix.default
            if _is_quantised(name, tensors[name]) and not kept:
                types[name] = state.type_of(name, tensors[name][-1])
    return types


def _converted(mix: FileType, name: str, shape: Shape, f32: Container[str]) -> QuantType:
    """The type that the converter gives a tensor."""
    plain = len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith((".weight", ".lora_a", ".lora_b"))
    if plain or name in f32 or _F32_NAMES.fullmatch(name):
        return QUANT_TYPES["F32"]
    kind = QUANT_TYPES[mix.default]
    return kind if shape[-1] % kind.block == 0 else QUANT_TYPES["F16"]


def _is_quantised(name: str, shape: Shape) -> bool:
    """Whether llama-quantize gives a tensor another type at all."""
    leading = [size for size in shape[:-1] if size != 1]
    return (
        bool(leading)
        and name.endswith("weight")
        and name not in _LEFT_NAMES
        and not any(p in name for p in _LEFT_PARTS)
    )


def _layer(name: str, otherwise: int) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else otherwise


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass
class _Walk:
    """llama-quantize's way through the tensors of a model; it counts some kinds."""

    mix: FileType
    model: FileTypeFacts
    has_importance: bool
    wishes: TypeOverrides
    names: frozenset[str]
    attention_v: int = 0
    ffn_down: int = 0
    patterns: list[tuple[re.Pattern[str], QuantType]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patterns = [(_pattern(text), type_named(kind)) for text, kind in self.wishes.overrides]
        self.attention_vs = sum(any(part in name for part in _ATTENTION_V) for name in self.names)
        self.tied = "output.weight" not in self.names

    def type_of(self, name: str, columns: int) -> QuantType:
        wished = next((kind for pattern, kind in self.patterns if pattern.search(name)), None)
        if self.wishes.embedding and name in _EMBEDDINGS and not (name == _EMBEDDINGS[1] and wished):
            return _fitting(name, type_named(self.wishes.embedding), columns)
        if self.wishes.output and name == "output.weight":
            return _fitting(name, type_named(self.wishes.output), columns)
        default = QUANT_TYPES[self.mix.default]
        if wished is None and (self.wishes.pure or default.block == 1):
            wished = default
        return _fallen_back(wished or QUANT_TYPES[self._ruled(name, columns)], columns)

    def _ruled(self, name: str, columns: int) -> str:
        """The type by the mix's rules."""
        default = self.mix.default
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
        if self.tied and self.wishes.output:
            return type_named(self.wishes.output).name
        if self.mix.default == "Q8_0" or self.model.arch == "falcon" or columns % QUANT_TYPES[self.mix.default].block:
            return "Q8_0"
        return "Q6_K"

    def _attention_v(self, i: int) -> str:
        label, many = self.mix.label, self.model.queries_a_key >= 4
        kind = self.mix.default
        if label == "Q2_K":
            kind = "Q4_K" if many else "Q3_K"
        elif label == "Q3_K_M":
            kind = "Q5_K" if i < 2 else "Q4_K"
        elif label == "Q3_K_L" or (label in ("IQ4_NL", "IQ4_XS") and many) or (label == "Q4_K_S" and i < 4):
            kind = "Q5_K"
        elif label in ("Q4_K_M", "Q5_K_M") and _more_bits(i, self.attention_vs):
            kind = "Q6_K"
        if self.model.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self.model.expert_count == 8 else kind

    def _attention_output(self) -> str:
        label = self.mix.label
        if self.model.arch == "falcon":
            return "Q4_K" if label == "Q3_K_L" else self.mix.default
        if self.model.expert_count == 8:
            better = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if label in better else self.mix.default
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(label, self.mix.default)

    def _ffn_layer(self, name: str) -> int:
        """Experts' tensors do not come one a layer: then the name says which layer it is."""
        if self.model.expert_count <= 1:
            return self.ffn_down - 1
        layer = _layer(name, -1)
        if not 0 <= layer < self.model.block_count:
            raise RecipeError(f"{name}: no layer of a model with {self.model.block_count}", hint="choose f16 or q8_0")
        return layer

    def _ffn_down(self, i: int, n: int) -> str:
        label, falcon, default = self.mix.label, self.model.arch == "falcon", self.mix.default
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
        if early and label in ("IQ4_NL", "IQ4_XS") and not self.has_importance:
            return "Q5_K"
        if early and label == "Q4_K_S" and not falcon:
            return "Q5_K"
        if early and label in ("Q4_0", "Q5_0") and self.has_importance:
            return label.replace("_0", "_1")
        return default


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text.lower())  # llama-quantize writes it in lower case, too
    except re.error as error:
        raise RecipeError(f"'{text}' is no regular expression: {error}", hint="as in blk\\.0\\..*=q8_0") from None


def _fitting(name: str, kind: QuantType, columns: int) -> QuantType:
    """A type that is wished for by the tensor's role, and so not replaced."""
    if columns % kind.block:
        raise RecipeError(
            f"{name} has {columns} columns, {kind.name} needs a multiple of {kind.block}", hint="Q8_0 or F16"
        )
    return kind


def _fallen_back(kind: QuantType, columns: int) -> QuantType:
    if columns % kind.block:
        kind = QUANT_TYPES[FALLBACKS.get(kind.name, kind.name)]
    return kind if columns % kind.block == 0 else QUANT_TYPES["F16"]
