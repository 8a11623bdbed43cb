"""GPTQ, AWQ, and what compressed-tensors and NVIDIA's ModelOpt write: packed integers, int8 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import Held, numbers, shape_check
from mergeforge.checkpoints.quantized.fp8_mxfp4 import POWERS, as_bytes
from mergeforge.checkpoints.quantized.rowwise import ByRow
from mergeforge.checkpoints.quantized.transposed import Words
from mergeforge.quant_codecs import int8, mxfp4, nvfp4, packed_int32
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_BITS = (2, 4, 8)  # of an integer that never lies in two words


def words_of_inputs(held: Held) -> None:
    """Find GPTQ's and AWQ's X.qweight, X.qzeros, X.scales and perhaps X.g_idx: X.weight is (out, in)."""
    for module, codes in list(held.ending(".qweight")):
        zeros, scales = (held.wants(f"{module}.{leaf}", codes.info.name) for leaf in ("qzeros", "scales"))
        groups = held.tensors.get(f"{module}.g_idx")
        sound = all(len(one.info.shape) == 2 for one in (codes, zeros, scales))
        if not sound or {codes.info.dtype, zeros.info.dtype} != {"I32"} or not scales.info.is_float:
            raise held.refuse(codes.info.name, "is no matrix of 32-bit words with float scales")
        outputs = scales.info.shape[1]
        packing = _awq if codes.info.shape[1] * 8 == outputs else _gptq
        found = packing(held, codes, zeros, scales, groups)
        inputs = codes.info.rows if found.awq else codes.info.rows * found.per_word
        shape_check(held, zeros, (scales.info.rows, outputs // found.per_word))
        if groups is None and inputs % scales.info.rows:
            raise held.refuse(codes.info.name, f"has {inputs} inputs, which are not {scales.info.rows} equal groups")
        held.put(f"{module}.weight", found, (outputs, inputs), held.dtype or "F16", (f"{module}.g_idx",))


def _gptq(
    held: Held, codes: StoredTensor, zeros: StoredTensor, scales: StoredTensor, groups: StoredTensor | None
) -> Words:
    rows, outputs = codes.info.shape
    told = held.settings.get("bits")
    per_word = outputs // zeros.info.shape[1] if zeros.info.shape[1] else 0
    bits = 32 // per_word if per_word else told
    if bits not in PLAIN_BITS or outputs != scales.info.shape[1] or outputs * bits % 32:
        raise held.refuse(codes.info.name, f"is GPTQ of {told or bits} bits, which cannot be read")
    if groups is not None:
        _check_groups(held, groups, rows * 32 // bits, scales.info.rows)
    newer = str(held.settings.get("checkpoint_format", "")).lower() == "gptq_v2"
    return Words(f"GPTQ int{bits}", codes, zeros, scales, groups, bits, not newer, awq=False)


def _awq(
    held: Held, codes: StoredTensor, zeros: StoredTensor, scales: StoredTensor, groups: StoredTensor | None
) -> Words:
    version = str(held.settings.get("version") or held.settings.get("format") or "gemm").lower()
    if version != "gemm" or held.settings.get("bits", 4) != 4:
        raise held.refuse(codes.info.name, f"is AWQ of the layout {version!r}, which cannot be read")
    return Words("AWQ int4", codes, zeros, scales, None, 4, zeros_less=False, awq=True)


def packed(held: Held) -> None:
    """Find X.weight_packed with X.weight_scale: words (compressed-tensors' pack-quantized) or bytes (NVFP4, MXFP4)."""
    for module, codes in list(held.ending(".weight_packed")):
        name = f"{module}.weight"
        scales = held.wants(f"{name}_scale", codes.info.name)
        if len(codes.info.shape) != 2 or scales.info.rows not in (1, codes.info.rows):
            raise held.refuse(
                codes.info.name, f"is {list(codes.info.shape)}, {scales.info.name} {list(scales.info.shape)}"
            )
        if codes.info.dtype == "I32":
            _packed_words(held, name, codes, scales)
        elif codes.info.dtype == "U8":
            whole = held.tensors.get(f"{name}_global_scale")
            _packed_bytes(held, name, codes, scales, whole, divides=True)
        else:
            raise held.refuse(codes.info.name, f"is {codes.info.dtype}, neither words nor bytes")


def modelopt(held: Held) -> None:
    """Find ModelOpt's NVFP4: X.weight in bytes, X.weight_scale in FP8 and X.weight_scale_2."""
    for name, whole in list(held.ending("_scale_2")):
        if (codes := held.tensors.get(name)) is not None and codes.info.dtype == "U8":
            scales = held.wants(f"{name}_scale", codes.info.name)
            _packed_bytes(held, name, codes, scales, whole, divides=False)


def _packed_bytes(
    held: Held, name: str, codes: StoredTensor, scales: StoredTensor, whole: StoredTensor | None, *, divides: bool
) -> None:
    columns = codes.info.columns * 2
    shape = (*codes.info.shape[:-1], columns)
    if whole is None and scales.info.dtype in POWERS:
        shape_check(held, scales, (*shape[:-1], columns // mxfp4.GROUP))
        held.put(
            name, ByRow("MXFP4", (codes, as_bytes(scales)), (), _mxfp4, temporaries=2), shape, held.dtype or "BF16"
        )
        return
    if whole is None or whole.info.numel != 1 or not whole.info.is_float or scales.info.dtype != "F8_E4M3":
        raise held.refuse(codes.info.name, "is packed in bytes, but its scales are not NVFP4's or MXFP4's")
    shape_check(held, scales, (*shape[:-1], columns // nvfp4.GROUP))
    packing = ByRow("NVFP4", (codes, scales), (whole,), partial(_nvfp4, divides=divides), temporaries=2)
    held.put(name, packing, shape, held.dtype or "BF16")


def _packed_words(held: Held, name: str, codes: StoredTensor, scales: StoredTensor) -> None:
    told = held.wants(f"{name}_shape", codes.info.name)
    size = told.info.bits // 8
    raw = numbers(told)
    shape = tuple(int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size))
    bits = _bits(held.settings, codes, shape[-1] if shape else 0)
    if (
        len(shape) != 2
        or not shape[1]
        or shape[0] != codes.info.rows
        or bits not in PLAIN_BITS
        or not scales.info.is_float
    ):
        raise held.refuse(codes.info.name, f"is {shape} packed in {list(codes.info.shape)} words, which cannot be read")
    count = scales.info.numel // scales.info.rows
    zeros, groups = held.tensors.get(f"{name}_zero_point"), held.tensors.get(f"{name}_g_idx")
    ordered = groups is not None and _check_groups(held, groups, shape[1], count)
    if not ordered and shape[1] % count:
        raise held.refuse(scales.info.name, f"has {count} groups, which do not divide {shape[1]} columns")
    if zeros is not None:
        shape_check(held, zeros, (-(-shape[0] * bits // 32), count))
    each, whole = ((codes, scales), ()) if scales.info.rows == shape[0] else ((codes,), (scales,))
    small = [one for one in (zeros, groups if ordered else None) if one is not None]
    values = partial(_words, bits, shape[1], count, zeros is not None, ordered)
    packing = ByRow(f"compressed-tensors int{bits}", each, (*whole, *small), values, temporaries=3)
    held.put(name, packing, (shape[0], shape[1]), held.dtype or "BF16", (told.info.name, f"{name}_g_idx"))


def _bits(settings: Mapping[str, Any], codes: StoredTensor, columns: int) -> int:
    """Bits of a weight: what fits the words; where several do, what the config says."""
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == codes.info.columns]
    groups = settings.get("config_groups")
    parts = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    told = [part.get("num_bits") for part in parts if isinstance(part, Mapping)]
    return next((bits for bits in told if bits in fitting), fitting[0] if len(fitting) == 1 else 0)


def _check_groups(held: Held, stored: StoredTensor, inputs: int, count: int) -> bool:
    """Whether a g_idx says the group of each input; all -1 says nothing. Raises SourceError where it cannot."""
    import numpy as np

    if stored.info.dtype not in ("I32", "I64"):
        raise held.refuse(stored.info.name, f"is {stored.info.dtype}, not the numbers of groups")
    shape_check(held, stored, (inputs,))
    found = np.frombuffer(numbers(stored), dtype=f"<i{stored.info.bits // 8}")
    if (found == -1).all():
        return False
    if found.min() < 0 or found.max() >= count:
        raise held.refuse(stored.info.name, f"names groups that do not exist: {count} have scales")
    return True


def eight_bit(held: Held) -> None:
    """Find compressed-tensors' int8: X in I8, X_scale and perhaps X_zero_point, for a row, a group or the tensor."""
    for name, codes in list(held.ending(".weight")):
        name = f"{name}.weight"
        if codes.info.dtype != "I8" or f"{name}_scale" not in held.tensors or len(codes.info.shape) != 2:
            continue
        scales = held.wants(f"{name}_scale", name)
        zeros = held.tensors.get(f"{name}_zero_point")
        count = scales.info.numel // scales.info.rows
        whole = scales.info.numel == 1
        fits = (whole or scales.info.rows == codes.info.rows) and not codes.info.columns % count
        if not fits or not scales.info.is_float or (zeros is not None and zeros.info.numel != scales.info.numel):
            raise held.refuse(scales.info.name, f"has the shape {list(scales.info.shape)}, which does not fit {name}")
        small = (scales, *([zeros] if zeros is not None else []))
        each, rest = ((codes,), small) if whole else ((codes, *small), ())
        held.put(
            name,
            ByRow("compressed-tensors int8", each, rest, _int8, temporaries=2),
            codes.info.shape,
            held.dtype or "BF16",
        )


def _int8(each: Sequence[Tensor], whole: Sequence[Tensor], start: int, stop: int) -> Tensor:
    codes, *small = [*each, *(one.view(1, 1) for one in whole)]
    return int8.from_steps(codes, small[0], small[1] if len(small) > 1 else None)


def _mxfp4(each: Sequence[Tensor], whole: Sequence[Tensor], start: int, stop: int) -> Tensor:
    return mxfp4.dequantise(each[0], each[1])


def _nvfp4(each: Sequence[Tensor], whole: Sequence[Tensor], start: int, stop: int, *, divides: bool) -> Tensor:
    return nvfp4.dequantise(each[0], each[1], whole[0], divides=divides)


def _words(
    bits: int,
    columns: int,
    count: int,
    has_zeros: bool,
    ordered: bool,
    each: Sequence[Tensor],
    whole: Sequence[Tensor],
    start: int,
    stop: int,
) -> Tensor:
    """Rows of compressed-tensors' packed integers."""
    codes, scales, *rest = [*each, *whole]
    per_word = 32 // bits
    half: Tensor | int = 1 << (bits - 1)
    if has_zeros:
        first = start // per_word
        some = packed_int32.split_down(rest[0][first : -(-stop // per_word)], bits)
        half = some[start - first * per_word : stop - first * per_word]
    groups = rest[-1].flatten() if ordered else None
    unpacked = packed_int32.split(codes, bits)[:, :columns].contiguous()
    return packed_int32.from_steps_by_row(unpacked, half, scales.view(-1, count), groups)
