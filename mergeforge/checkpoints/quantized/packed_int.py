"""Detect GPTQ, AWQ, and the packed integers, int8 and NVFP4 of compressed-tensors and NVIDIA ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import QuantGroupFinder, check_shape, read_small_tensor
from mergeforge.checkpoints.quantized.fp8_mxfp4 import E8M0_DTYPES, as_bytes
from mergeforge.checkpoints.quantized.rowwise import RowwiseLayout
from mergeforge.checkpoints.quantized.transposed import PackedInt32Layout
from mergeforge.quant_codecs import fp4, integers
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_BITS = (2, 4, 8)  # widths of integers that never span two words


def detect_gptq_awq(finder: QuantGroupFinder) -> None:
    """Find GPTQ's and AWQ's X.qweight, X.qzeros, X.scales and perhaps X.g_idx: X.weight is (out, in)."""
    for module, codes in list(finder.with_suffix(".qweight")):
        zeros, scales = (finder.require(f"{module}.{leaf}", codes.info.name) for leaf in ("qzeros", "scales"))
        groups = finder.tensors.get(f"{module}.g_idx")
        are_matrices = all(len(stored.info.shape) == 2 for stored in (codes, zeros, scales))
        if not are_matrices or {codes.info.dtype, zeros.info.dtype} != {"I32"} or not scales.info.is_float:
            raise finder.error(codes.info.name, "is not a matrix of 32-bit words with float scales")
        outputs = scales.info.shape[1]
        make_layout = _awq if codes.info.shape[1] * 8 == outputs else _gptq
        layout = make_layout(finder, codes, zeros, scales, groups)
        inputs = codes.info.rows if layout.awq else codes.info.rows * layout.values_per_word
        check_shape(finder, zeros, (scales.info.rows, outputs // layout.values_per_word))
        if groups is None and inputs % scales.info.rows:
            raise finder.error(
                codes.info.name, f"has {inputs} inputs, which do not divide into {scales.info.rows} equal groups"
            )
        finder.add_group(f"{module}.weight", layout, (outputs, inputs), finder.dtype or "F16", (f"{module}.g_idx",))


def _gptq(
    finder: QuantGroupFinder,
    codes: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
) -> PackedInt32Layout:
    rows, outputs = codes.info.shape
    config_bits = finder.quant_config.get("bits")
    per_word = outputs // zeros.info.shape[1] if zeros.info.shape[1] else 0
    bits = 32 // per_word if per_word else config_bits
    if bits not in PLAIN_BITS or outputs != scales.info.shape[1] or outputs * bits % 32:
        raise finder.error(codes.info.name, f"is GPTQ with {config_bits or bits} bits, which is not supported")
    if groups is not None:
        _check_groups(finder, groups, rows * 32 // bits, scales.info.rows)
    is_v2 = str(finder.quant_config.get("checkpoint_format", "")).lower() == "gptq_v2"
    return PackedInt32Layout(f"GPTQ int{bits}", codes, zeros, scales, groups, bits, not is_v2, awq=False)


def _awq(
    finder: QuantGroupFinder,
    codes: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
) -> PackedInt32Layout:
    version = str(finder.quant_config.get("version") or finder.quant_config.get("format") or "gemm").lower()
    if version != "gemm" or finder.quant_config.get("bits", 4) != 4:
        raise finder.error(codes.info.name, f"is AWQ in the layout {version!r}, which is not supported")
    return PackedInt32Layout("AWQ int4", codes, zeros, scales, None, 4, zeros_minus_one=False, awq=True)


def detect_packed(finder: QuantGroupFinder) -> None:
    """Find X.weight_packed with X.weight_scale: words (compressed-tensors' pack-quantized) or bytes (NVFP4, MXFP4)."""
    for module, codes in list(finder.with_suffix(".weight_packed")):
        name = f"{module}.weight"
        scales = finder.require(f"{name}_scale", codes.info.name)
        if len(codes.info.shape) != 2 or scales.info.rows not in (1, codes.info.rows):
            raise finder.error(
                codes.info.name, f"is {list(codes.info.shape)}, {scales.info.name} {list(scales.info.shape)}"
            )
        if codes.info.dtype == "I32":
            _packed_words(finder, name, codes, scales)
        elif codes.info.dtype == "U8":
            global_scale = finder.tensors.get(f"{name}_global_scale")
            _packed_bytes(finder, name, codes, scales, global_scale, divides=True)
        else:
            raise finder.error(codes.info.name, f"is {codes.info.dtype}, neither words nor bytes")


def detect_modelopt_nvfp4(finder: QuantGroupFinder) -> None:
    """Find ModelOpt's NVFP4: X.weight in bytes, X.weight_scale in FP8 and X.weight_scale_2."""
    for name, global_scale in list(finder.with_suffix("_scale_2")):
        if (codes := finder.tensors.get(name)) is not None and codes.info.dtype == "U8":
            scales = finder.require(f"{name}_scale", codes.info.name)
            _packed_bytes(finder, name, codes, scales, global_scale, divides=False)


def _packed_bytes(
    finder: QuantGroupFinder,
    name: str,
    codes: StoredTensor,
    scales: StoredTensor,
    global_scale: StoredTensor | None,
    *,
    divides: bool,
) -> None:
    columns = codes.info.columns * 2
    shape = (*codes.info.shape[:-1], columns)
    if global_scale is None and scales.info.dtype in E8M0_DTYPES:
        check_shape(finder, scales, (*shape[:-1], columns // fp4.MXFP4_GROUP))
        finder.add_group(
            name,
            RowwiseLayout("MXFP4", (codes, as_bytes(scales)), (), _mxfp4, temporaries=2),
            shape,
            finder.dtype or "BF16",
        )
        return
    if (
        global_scale is None
        or global_scale.info.numel != 1
        or not global_scale.info.is_float
        or scales.info.dtype != "F8_E4M3"
    ):
        raise finder.error(codes.info.name, "is packed in bytes, but its scales are not NVFP4's or MXFP4's")
    check_shape(finder, scales, (*shape[:-1], columns // fp4.NVFP4_GROUP))
    layout = RowwiseLayout("NVFP4", (codes, scales), (global_scale,), partial(_nvfp4, divides=divides), temporaries=2)
    finder.add_group(name, layout, shape, finder.dtype or "BF16")


def _packed_words(finder: QuantGroupFinder, name: str, codes: StoredTensor, scales: StoredTensor) -> None:
    stored_shape = finder.require(f"{name}_shape", codes.info.name)
    size = stored_shape.info.bits // 8
    raw = read_small_tensor(stored_shape)
    shape = tuple(int.from_bytes(raw[start : start + size], "little") for start in range(0, len(raw), size))
    bits = _bits(finder.quant_config, codes, shape[-1] if shape else 0)
    if (
        len(shape) != 2
        or not shape[1]
        or shape[0] != codes.info.rows
        or bits not in PLAIN_BITS
        or not scales.info.is_float
    ):
        raise finder.error(
            codes.info.name, f"is {shape} packed in {list(codes.info.shape)} words, which is not supported"
        )
    count = scales.info.numel // scales.info.rows
    zeros, groups = finder.tensors.get(f"{name}_zero_point"), finder.tensors.get(f"{name}_g_idx")
    has_groups = groups is not None and _check_groups(finder, groups, shape[1], count)
    if not has_groups and shape[1] % count:
        raise finder.error(scales.info.name, f"has {count} groups, which do not divide {shape[1]} columns")
    if zeros is not None:
        check_shape(finder, zeros, (-(-shape[0] * bits // 32), count))
    rowwise, shared = ((codes, scales), ()) if scales.info.rows == shape[0] else ((codes,), (scales,))
    optional = [stored for stored in (zeros, groups if has_groups else None) if stored is not None]
    dequantize = partial(_words, bits, shape[1], count, zeros is not None, has_groups)
    label = f"compressed-tensors int{bits}"
    layout = RowwiseLayout(label, rowwise, (*shared, *optional), dequantize, temporaries=3)
    finder.add_group(
        name, layout, (shape[0], shape[1]), finder.dtype or "BF16", (stored_shape.info.name, f"{name}_g_idx")
    )


def _bits(quant_config: Mapping[str, Any], codes: StoredTensor, columns: int) -> int:
    """Bits per weight: those that fit the words; if several do, those in the config."""
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == codes.info.columns]
    groups = quant_config.get("config_groups")
    parts = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    config_bits = [part.get("num_bits") for part in parts if isinstance(part, Mapping)]
    return next((bits for bits in config_bits if bits in fitting), fitting[0] if len(fitting) == 1 else 0)


def _check_groups(finder: QuantGroupFinder, stored: StoredTensor, inputs: int, count: int) -> bool:
    """Whether a g_idx gives the group of each input; all -1 gives none. Raises SourceError if it is invalid."""
    import numpy as np

    if stored.info.dtype not in ("I32", "I64"):
        raise finder.error(stored.info.name, f"is {stored.info.dtype}, not a list of group numbers")
    check_shape(finder, stored, (inputs,))
    groups = np.frombuffer(read_small_tensor(stored), dtype=f"<i{stored.info.bits // 8}")
    if (groups == -1).all():
        return False
    if groups.min() < 0 or groups.max() >= count:
        raise finder.error(stored.info.name, f"names groups that do not exist; {count} groups have scales")
    return True


def detect_ct_int8(finder: QuantGroupFinder) -> None:
    """Find compressed-tensors' int8: X in I8, X_scale and perhaps X_zero_point, for a row, a group or the tensor."""
    for name, codes in list(finder.with_suffix(".weight")):
        name = f"{name}.weight"
        if codes.info.dtype != "I8" or f"{name}_scale" not in finder.tensors or len(codes.info.shape) != 2:
            continue
        scales = finder.require(f"{name}_scale", name)
        zeros = finder.tensors.get(f"{name}_zero_point")
        count = scales.info.numel // scales.info.rows
        per_tensor = scales.info.numel == 1
        fits = (per_tensor or scales.info.rows == codes.info.rows) and not codes.info.columns % count
        if not fits or not scales.info.is_float or (zeros is not None and zeros.info.numel != scales.info.numel):
            raise finder.error(scales.info.name, f"has the shape {list(scales.info.shape)}, which does not fit {name}")
        parameters = (scales, *([zeros] if zeros is not None else []))
        rowwise, shared = ((codes,), parameters) if per_tensor else ((codes, *parameters), ())
        finder.add_group(
            name,
            RowwiseLayout("compressed-tensors int8", rowwise, shared, _int8, temporaries=2),
            codes.info.shape,
            finder.dtype or "BF16",
        )


def _int8(rowwise: Sequence[Tensor], shared: Sequence[Tensor], start: int, stop: int) -> Tensor:
    codes, scales, *zeros = [*rowwise, *(tensor.view(1, 1) for tensor in shared)]
    return integers.dequantize_int8(codes, scales, zeros[0] if zeros else None)


def _mxfp4(rowwise: Sequence[Tensor], shared: Sequence[Tensor], start: int, stop: int) -> Tensor:
    return fp4.dequantize_mxfp4(rowwise[0], rowwise[1])


def _nvfp4(rowwise: Sequence[Tensor], shared: Sequence[Tensor], start: int, stop: int, *, divides: bool) -> Tensor:
    return fp4.dequantize_nvfp4(rowwise[0], rowwise[1], shared[0], divides=divides)


def _words(
    bits: int,
    columns: int,
    count: int,
    has_zeros: bool,
    has_groups: bool,
    rowwise: Sequence[Tensor],
    shared: Sequence[Tensor],
    start: int,
    stop: int,
) -> Tensor:
    """Dequantize rows of compressed-tensors' packed integers."""
    codes, scales, *optional = [*rowwise, *shared]
    per_word = 32 // bits
    zeros: Tensor | int = 1 << (bits - 1)
    if has_zeros:
        first = start // per_word
        unpacked_zeros = integers.unpack_columns(optional[0][first : -(-stop // per_word)], bits)
        zeros = unpacked_zeros[start - first * per_word : stop - first * per_word]
    groups = optional[-1].flatten() if has_groups else None
    unpacked = integers.unpack_rows(codes, bits)[:, :columns].contiguous()
    return integers.dequantize_by_row(unpacked, zeros, scales.view(-1, count), groups)
