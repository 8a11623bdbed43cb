"""FP8 weights with their scales, and gpt-oss's MXFP4 experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.detection_state import Held, shape_check
from mergeforge.checkpoints.quantized.rowwise import ByRow
from mergeforge.checkpoints.quantized.transposed import Experts
from mergeforge.quant_codecs import fp8, mxfp4
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
POWERS = ("U8", "F8_E8M0")  # scales that are exponents
SCALES = ("_scale_inv", "_scale")


def experts(held: Held) -> None:
    """Find X_blocks (experts, out, groups, 16) and X_scales: X is (experts, in, out), as transformers has it."""
    for name, codes in list(held.ending("_blocks")):
        if codes.info.dtype != "U8" or len(codes.info.shape) != 4 or codes.info.shape[3] != mxfp4.GROUP // 2:
            continue
        exponents = held.wants(f"{name}_scales", codes.info.name)
        count, outputs, groups, _ = codes.info.shape
        shape_check(held, exponents, (count, outputs, groups))
        if exponents.info.dtype not in POWERS:
            raise held.refuse(exponents.info.name, f"is {exponents.info.dtype}, not exponents of one byte")
        shape = (count, groups * mxfp4.GROUP, outputs)
        held.put(name, Experts("MXFP4", codes, exponents), shape, held.dtype or "BF16")


def eight_bit(held: Held) -> None:
    """Find weights in FP8 with X_scale_inv or X_scale beside them, in whatever file that lies."""
    for name, weight in list(held.tensors.items()):
        if weight.info.dtype not in FP8 or name in held.used or len(weight.info.shape) not in (2, 3):
            continue
        scales = next((held.tensors[name + end] for end in SCALES if name + end in held.tensors), None)
        if scales is None:
            if held.settings:
                raise held.refuse(name, f"is {weight.info.dtype} and has no scale ({name}_scale_inv or _scale)")
            continue
        held.put(name, _packing(held, weight, scales), weight.info.shape, held.dtype or "BF16")


def _packing(held: Held, weight: StoredTensor, scales: StoredTensor) -> ByRow:
    rows, columns = weight.info.shape[-2:]
    high, wide = _block(held, weight, scales)
    exponents = scales.info.dtype in POWERS
    if high == 1:
        return ByRow("FP8", (weight, as_bytes(scales)), (), partial(_by_row, wide, exponents), temporaries=2)
    values = partial(_by_block, rows, high, wide, -(-columns // wide), exponents)
    return ByRow("FP8", (weight,), (as_bytes(scales),), values, temporaries=2)


def as_bytes(scales: StoredTensor) -> StoredTensor:
    """E8M0 scales as plain bytes: older versions of torch have no such dtype."""
    return StoredTensor(scales.info.with_dtype("U8"), scales.file, scales.offset) if scales.info.bits == 8 else scales


def _block(held: Held, weight: StoredTensor, scales: StoredTensor) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises SourceError where the scales' shape fits none."""
    rows, columns = weight.info.shape[-2:]
    shape = scales.info.shape
    if scales.info.dtype not in (*POWERS, "F32", "BF16", "F16"):
        raise held.refuse(scales.info.name, f"has the dtype {scales.info.dtype}")
    if scales.info.numel == 1:
        return max(weight.info.rows, 2), columns
    if shape in (weight.info.shape[:-1], (*weight.info.shape[:-1], 1)):
        return 1, columns
    if len(shape) == len(weight.info.shape) and shape[:-2] == weight.info.shape[:-2]:
        for high, wide in _sizes(held.settings, rows, columns, shape):
            if (-(-rows // high), -(-columns // wide)) == shape[-2:]:
                return high, wide
    raise held.refuse(
        scales.info.name, f"has the shape {list(shape)}, which fits no block of {list(weight.info.shape)}"
    )


def _sizes(settings: Mapping[str, Any], rows: int, columns: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Sizes of blocks to try: what the config says, what divides evenly, and the usual one."""
    for told in (settings.get("weight_block_size"), *_structures(settings)):
        if isinstance(told, list) and len(told) == 2 and all(isinstance(size, int) and size > 0 for size in told):
            yield told[0], told[1]
    if shape[-2] and shape[-1] and not rows % shape[-2] and not columns % shape[-1]:
        yield rows // shape[-2], columns // shape[-1]
    yield 128, 128


def _structures(settings: Mapping[str, Any]) -> Iterator[Any]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights.get("block_structure")


def _by_row(
    wide: int, exponents: bool, each: Sequence[Tensor], whole: Sequence[Tensor], start: int, stop: int
) -> Tensor:
    """Rows that have scales of their own."""
    return fp8.dequantise(each[0], fp8.powers(each[1]) if exponents else each[1].float(), wide)


def _by_block(
    rows: int,
    high: int,
    wide: int,
    across: int,
    exponents: bool,
    each: Sequence[Tensor],
    whole: Sequence[Tensor],
    start: int,
    stop: int,
) -> Tensor:
    """Rows of one matrix, or of a stack of matrices of `rows` rows each, `high` of which share their scales."""
    import torch

    scales = fp8.powers(whole[0]) if exponents else whole[0].float()
    if scales.numel() == 1:
        return fp8.dequantise(each[0], scales.view(1, 1), wide)
    wanted = torch.arange(start, stop, device=scales.device)
    wanted = wanted // rows * -(-rows // high) + wanted % rows // high
    return fp8.dequantise(each[0], scales.view(-1, across)[wanted], wide)
