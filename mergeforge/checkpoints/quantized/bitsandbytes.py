"""bitsandbytes' tensors: 4-bit ones describe themselves in a quant_state, 8-bit ones have row maxima (SCB)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import Held, description, dtype_named, numbers, shape_check
from mergeforge.checkpoints.quantized.flat_4bit import FourBit, Nested
from mergeforge.checkpoints.quantized.rowwise import ByRow
from mergeforge.quant_codecs import int8, nf4

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
FOUR_BIT = {"nf4": "bitsandbytes NF4", "fp4": "bitsandbytes FP4"}
EIGHT_BIT = "bitsandbytes int8"


def four_bit(held: Held) -> None:
    """Find weights with a quant_state: X, X.absmax, X.quant_map and, nested, X.nested_absmax and its map."""
    for name in list(held.tensors):
        weight, found, kind = name.partition(STATE)
        if found:
            _four_bit(held, weight, kind, name)


def _four_bit(held: Held, weight: str, kind: str, state_name: str) -> None:
    state = description(held.tensors[state_name])
    shape, block = _shape(state), state.get("blocksize")
    dtype = dtype_named(state.get("dtype"))
    if kind not in FOUR_BIT or state.get("quant_type") != kind or not shape or not dtype or not isinstance(block, int):
        raise held.refuse(weight, f"has a quant_state that is not understood: {state}")
    codes = held.wants(weight, "its quant_state")
    levels, largest = (held.wants(f"{weight}.{leaf}", "its quant_state") for leaf in ("quant_map", "absmax"))
    count = math.prod(shape)
    if block < 2 or codes.info.nbytes != -(-count // 2) or largest.info.numel != -(-count // block):
        raise held.refuse(weight, f"does not hold the {count} values of its quant_state")
    shape_check(held, levels, (16,))
    nested = _nested(held, weight, state, largest.info.numel) if "nested_offset" in state else None
    if nested is None and not largest.info.is_float:
        raise held.refuse(largest.info.name, f"is {largest.info.dtype}, but its quant_state is not nested")
    held.put(weight, FourBit(FOUR_BIT[kind], codes, levels, largest, block, nested), shape, dtype, (state_name,))


def _nested(held: Held, weight: str, state: Mapping[str, Any], count: int) -> Nested:
    levels, largest = (held.wants(f"{weight}.nested_{leaf}", "its quant_state") for leaf in ("quant_map", "absmax"))
    if state.get("nested_blocksize") != nf4.NESTED or held.tensors[f"{weight}.absmax"].info.dtype != "U8":
        raise held.refuse(weight, "has nested statistics of an unknown kind")
    shape_check(held, levels, (256,))
    shape_check(held, largest, (-(-count // nf4.NESTED),))
    return Nested(levels, largest, float(state["nested_offset"]))


def _shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    sound = isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
    return tuple(shape) if sound and isinstance(shape, list) else ()


def eight_bit(held: Held) -> None:
    """Find X.SCB (out,) float beside X.weight (out, in) I8, and perhaps X.weight_format (0: rows)."""
    for module, maxima in list(held.ending(".SCB")):
        weight = held.wants(f"{module}.weight", maxima.info.name)
        if weight.info.dtype != "I8" or len(weight.info.shape) != 2 or maxima.info.numel != weight.info.rows:
            raise held.refuse(weight.info.name, f"and {maxima.info.name} do not fit together")
        layout = held.tensors.get(f"{module}.weight_format")
        if layout is not None and any(numbers(layout)):
            raise held.refuse(weight.info.name, "is stored in a GPU's tile order, not in rows")
        packing = ByRow(EIGHT_BIT, (weight, maxima), (), _int8, temporaries=2)
        held.put(f"{module}.weight", packing, weight.info.shape, held.dtype or "F16", (f"{module}.weight_format",))


def _int8(each: Sequence[Tensor], whole: Sequence[Tensor], start: int, stop: int) -> Tensor:
    return int8.from_row_maxima(each[0], each[1])
