"""Detect bitsandbytes tensors: 4-bit ones have a quant_state, 8-bit ones row maxima (SCB)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import (
    QuantGroupFinder,
    check_shape,
    float_dtype_name,
    read_json_tensor,
    read_small_tensor,
)
from mergeforge.checkpoints.quantized.flat_4bit import DoubleQuant, Flat4BitLayout
from mergeforge.checkpoints.quantized.rowwise import RowwiseLayout
from mergeforge.quant_codecs import integers, nf4

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
FOUR_BIT = {"nf4": "bitsandbytes NF4", "fp4": "bitsandbytes FP4"}
EIGHT_BIT = "bitsandbytes int8"


def detect_bnb_4bit(finder: QuantGroupFinder) -> None:
    """Find weights with a quant_state: X, X.absmax, X.quant_map and, nested, X.nested_absmax and its map."""
    for name in list(finder.tensors):
        weight, separator, quant_type = name.partition(STATE)
        if separator:
            _add_4bit(finder, weight, quant_type, name)


def _add_4bit(finder: QuantGroupFinder, weight: str, quant_type: str, state_name: str) -> None:
    state = read_json_tensor(finder.tensors[state_name])
    shape, block = _shape(state), state.get("blocksize")
    dtype = float_dtype_name(state.get("dtype"))
    if (
        quant_type not in FOUR_BIT
        or state.get("quant_type") != quant_type
        or not shape
        or not dtype
        or not isinstance(block, int)
    ):
        raise finder.error(weight, f"has an unsupported quant_state: {state}")
    codes = finder.require(weight, "its quant_state")
    levels, absmax = (finder.require(f"{weight}.{leaf}", "its quant_state") for leaf in ("quant_map", "absmax"))
    count = math.prod(shape)
    if block < 2 or codes.info.nbytes != -(-count // 2) or absmax.info.numel != -(-count // block):
        raise finder.error(weight, f"does not hold the {count} values of its quant_state")
    check_shape(finder, levels, (16,))
    double_quant = _double_quant(finder, weight, state, absmax.info.numel) if "nested_offset" in state else None
    if double_quant is None and not absmax.info.is_float:
        raise finder.error(absmax.info.name, f"is {absmax.info.dtype}, but its quant_state is not nested")
    finder.add_group(
        weight,
        Flat4BitLayout(FOUR_BIT[quant_type], codes, levels, absmax, block, double_quant),
        shape,
        dtype,
        (state_name,),
    )


def _double_quant(finder: QuantGroupFinder, weight: str, state: Mapping[str, Any], count: int) -> DoubleQuant:
    levels, absmax = (finder.require(f"{weight}.nested_{leaf}", "its quant_state") for leaf in ("quant_map", "absmax"))
    if state.get("nested_blocksize") != nf4.ABSMAX_BLOCK or finder.tensors[f"{weight}.absmax"].info.dtype != "U8":
        raise finder.error(weight, "has nested statistics of an unsupported kind")
    check_shape(finder, levels, (256,))
    check_shape(finder, absmax, (-(-count // nf4.ABSMAX_BLOCK),))
    return DoubleQuant(levels, absmax, float(state["nested_offset"]))


def _shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    is_valid = isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
    return tuple(shape) if is_valid and isinstance(shape, list) else ()


def detect_bnb_int8(finder: QuantGroupFinder) -> None:
    """Find X.SCB (out,) float next to X.weight (out, in) I8, and perhaps X.weight_format (0: rows)."""
    for module, maxima in list(finder.with_suffix(".SCB")):
        weight = finder.require(f"{module}.weight", maxima.info.name)
        if weight.info.dtype != "I8" or len(weight.info.shape) != 2 or maxima.info.numel != weight.info.rows:
            raise finder.error(weight.info.name, f"and {maxima.info.name} do not match")
        layout = finder.tensors.get(f"{module}.weight_format")
        if layout is not None and any(read_small_tensor(layout)):
            raise finder.error(weight.info.name, "is stored in a GPU's tile order, not in rows")
        quant_layout = RowwiseLayout(EIGHT_BIT, (weight, maxima), (), _int8, temporaries=2)
        finder.add_group(
            f"{module}.weight", quant_layout, weight.info.shape, finder.dtype or "F16", (f"{module}.weight_format",)
        )


def _int8(rowwise: Sequence[Tensor], shared: Sequence[Tensor], start: int, stop: int) -> Tensor:
    return integers.dequantize_rowwise(rowwise[0], rowwise[1])
