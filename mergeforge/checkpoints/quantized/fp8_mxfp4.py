"""Detect FP8 weights with scales, and the MXFP4 experts of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import QuantGroupFinder, check_shape
from mergeforge.checkpoints.quantized.rowwise import RowwiseLayout
from mergeforge.checkpoints.quantized.transposed import MXFP4ExpertsLayout
from mergeforge.quant_codecs import fp4, fp8
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
E8M0_DTYPES = ("U8", "F8_E8M0")  # scales that are powers of two
SCALES = ("_scale_inv", "_scale")


def detect_mxfp4_experts(finder: QuantGroupFinder) -> None:
    """Find X_blocks (experts, out, groups, 16) and X_scales: X is (experts, in, out), as in transformers."""
    for name, codes in list(finder.with_suffix("_blocks")):
        if codes.info.dtype != "U8" or len(codes.info.shape) != 4 or codes.info.shape[3] != fp4.MXFP4_GROUP // 2:
            continue
        exponents = finder.require(f"{name}_scales", codes.info.name)
        count, outputs, groups, _ = codes.info.shape
        check_shape(finder, exponents, (count, outputs, groups))
        if exponents.info.dtype not in E8M0_DTYPES:
            raise finder.error(exponents.info.name, f"is {exponents.info.dtype}, not exponents of one byte")
        shape = (count, groups * fp4.MXFP4_GROUP, outputs)
        finder.add_group(name, MXFP4ExpertsLayout("MXFP4", codes, exponents), shape, finder.dtype or "BF16")


def detect_fp8(finder: QuantGroupFinder) -> None:
    """Find weights in FP8 with X_scale_inv or X_scale, in whatever file that is."""
    for name, weight in list(finder.tensors.items()):
        if weight.info.dtype not in FP8 or name in finder.used or len(weight.info.shape) not in (2, 3):
            continue
        scales = next((finder.tensors[name + suffix] for suffix in SCALES if name + suffix in finder.tensors), None)
        if scales is None:
            if finder.quant_config:
                raise finder.error(name, f"is {weight.info.dtype} and has no scale ({name}_scale_inv or _scale)")
            continue
        finder.add_group(name, _layout(finder, weight, scales), weight.info.shape, finder.dtype or "BF16")


def _layout(finder: QuantGroupFinder, weight: StoredTensor, scales: StoredTensor) -> RowwiseLayout:
    rows, columns = weight.info.shape[-2:]
    block_rows, block_columns = _block(finder, weight, scales)
    exponents = scales.info.dtype in E8M0_DTYPES
    if block_rows == 1:
        return RowwiseLayout(
            "FP8", (weight, as_bytes(scales)), (), partial(_by_row, block_columns, exponents), temporaries=2
        )
    dequantize = partial(_by_block, rows, block_rows, block_columns, -(-columns // block_columns), exponents)
    return RowwiseLayout("FP8", (weight,), (as_bytes(scales),), dequantize, temporaries=2)


def as_bytes(scales: StoredTensor) -> StoredTensor:
    """E8M0 scales as plain bytes, because older versions of torch do not have the dtype."""
    return StoredTensor(scales.info.with_dtype("U8"), scales.file, scales.offset) if scales.info.bits == 8 else scales


def _block(finder: QuantGroupFinder, weight: StoredTensor, scales: StoredTensor) -> tuple[int, int]:
    """The rows and columns of the block that shares a scale. Raises SourceError if the scales' shape fits none."""
    rows, columns = weight.info.shape[-2:]
    shape = scales.info.shape
    if scales.info.dtype not in (*E8M0_DTYPES, "F32", "BF16", "F16"):
        raise finder.error(scales.info.name, f"has the unsupported dtype {scales.info.dtype}")
    if scales.info.numel == 1:
        return max(weight.info.rows, 2), columns
    if shape in (weight.info.shape[:-1], (*weight.info.shape[:-1], 1)):
        return 1, columns
    if len(shape) == len(weight.info.shape) and shape[:-2] == weight.info.shape[:-2]:
        for height, width in _block_sizes(finder.quant_config, rows, columns, shape):
            if (-(-rows // height), -(-columns // width)) == shape[-2:]:
                return height, width
    raise finder.error(
        scales.info.name, f"has the shape {list(shape)}, which fits no block of {list(weight.info.shape)}"
    )


def _block_sizes(
    quant_config: Mapping[str, Any], rows: int, columns: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Block sizes to try: those in the config, the one that divides evenly, and the usual one."""
    for sizes in (quant_config.get("weight_block_size"), *_structures(quant_config)):
        if isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
            yield sizes[0], sizes[1]
    if shape[-2] and shape[-1] and not rows % shape[-2] and not columns % shape[-1]:
        yield rows // shape[-2], columns // shape[-1]
    yield 128, 128


def _structures(quant_config: Mapping[str, Any]) -> Iterator[Any]:
    """The block_structure of each config group of compressed-tensors."""
    groups = quant_config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights.get("block_structure")


def _by_row(
    block_columns: int, exponents: bool, rowwise: Sequence[Tensor], shared: Sequence[Tensor], start: int, stop: int
) -> Tensor:
    """Dequantize rows that have scales of their own."""
    return fp8.dequantize(
        rowwise[0], fp8.e8m0_to_float32(rowwise[1]) if exponents else rowwise[1].float(), block_columns
    )


def _by_block(
    rows: int,
    block_rows: int,
    block_columns: int,
    blocks_per_row: int,
    exponents: bool,
    rowwise: Sequence[Tensor],
    shared: Sequence[Tensor],
    start: int,
    stop: int,
) -> Tensor:
    """Dequantize rows of a matrix, or of a stack of matrices of `rows` rows each; `block_rows` rows share scales."""
    import torch

    scales = fp8.e8m0_to_float32(shared[0]) if exponents else shared[0].float()
    if scales.numel() == 1:
        return fp8.dequantize(rowwise[0], scales.view(1, 1), block_columns)
    row = torch.arange(start, stop, device=scales.device)
    scale_row = row // rows * -(-rows // block_rows) + row % rows // block_rows
    return fp8.dequantize(rowwise[0], scales.view(-1, blocks_per_row)[scale_row], block_columns)
