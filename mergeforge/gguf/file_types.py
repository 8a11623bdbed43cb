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
from dataclasses import dataclass

from mergeforge.core.registry import Registry
from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.gguf.type_rules import (
    NO_OVERRIDES,
    ModelHparams,
    Shape,
    TensorTypeSelector,
    TypeOverrides,
    layer_of,
    quant_type_named,
)

__all__ = [
    "ALIASES",
    "FILE_TYPES",
    "FileType",
    "ModelHparams",
    "Shape",
    "TypeOverrides",
    "file_order",
    "file_type_named",
    "quant_type_named",
    "register_file_type",
    "select_requantized_types",
    "select_tensor_types",
]


@dataclass(frozen=True)
class FileType:
    """A file type (llama_ftype): label, general.file_type, the type of most tensors, and whose rules it follows."""

    label: str
    number: int
    default_type: str
    by_llama_quantize: bool = True  # else by the converter
    needs_training: bool = False  # useless for weights that were not trained with one bit or ternary values


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
    FileType("Q1_0", 40, "Q1_0", needs_training=True),
    FileType("Q2_0", 41, "Q2_0", needs_training=True),
    FileType("TQ1_0", 36, "TQ1_0", needs_training=True),
    FileType("TQ2_0", 37, "TQ2_0", needs_training=True),
    FileType("Q4_0", 2, "Q4_0"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("MXFP4_MOE", 38, "MXFP4"),
    FileType("IQ1_S", 24, "IQ1_S"),
    FileType("IQ1_M", 31, "IQ1_M"),
    FileType("IQ2_XXS", 19, "IQ2_XXS"),
    FileType("IQ2_XS", 20, "IQ2_XS"),
    FileType("IQ2_S", 28, "IQ2_XS"),
    FileType("IQ2_M", 29, "IQ2_S"),
    FileType("IQ3_XXS", 23, "IQ3_XXS"),
    FileType("IQ3_XS", 22, "IQ3_S"),
    FileType("IQ3_S", 26, "IQ3_S"),
    FileType("IQ3_M", 27, "IQ3_S"),
    FileType("Q2_K_S", 21, "Q2_K"),
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


def file_type_named(name: str) -> FileType:
    """The file type of a name or alias, in upper or lower case. Raises RecipeError."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in FILE_TYPES:
        hint = did_you_mean(key, [*FILE_TYPES, *ALIASES]) or "one of " + ", ".join(FILE_TYPES)
        raise RecipeError(f"unknown GGUF type '{name}'", hint=hint)
    return FILE_TYPES[key]


def file_order(names: Sequence[str]) -> list[str]:
    """Names in llama-quantize's order: tensors outside of blocks, then block by block, each sorted by name as bytes."""
    return sorted(names, key=lambda name: (layer_of(name), name.encode()))


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
        selector = TensorTypeSelector(file_type, model, has_imatrix, overrides, frozenset(tensors))
        for name in file_order(list(tensors)):
            stays_f32 = not file_type.by_llama_quantize and types[name].name == "F32" != file_type.default_type
            if _is_quantized(name, tensors[name]) and not stays_f32:
                types[name] = selector.select(name, tensors[name])
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
    selector = TensorTypeSelector(file_type, model, has_imatrix, overrides, frozenset(tensors))
    return {name: selector.select(name, shape) for name, shape in tensors.items() if _is_quantized(name, shape)}


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
