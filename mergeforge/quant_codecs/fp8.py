"""8-bit floats with one scale per tensor, per row, or per block of rows and columns.

The value is weight * scale, whether the scale is called `weight_scale` or `weight_scale_inv` (see DeepSeek-V3's config
and transformers' integrations/finegrained_fp8.py). Blocks at the edges may be smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
MIN_ABSMAX = 1e-35  # smaller ones become zero: 448 / 1e-36 exceeds float32


def dequantize(weight: Tensor, scales: Tensor, block_columns: int) -> Tensor:
    """Rows of FP8 weights times `scales`: (rows, blocks of a row), or one for all."""
    values = to_float32(weight)
    columns = values.shape[1]
    if scales.numel() == 1 or scales.shape[1] == 1:
        return values.mul_(scales.view(-1, 1))
    full_columns = columns // block_columns * block_columns
    values[:, :full_columns].view(len(values), -1, block_columns).mul_(scales[:, : full_columns // block_columns, None])
    if full_columns < columns:
        values[:, full_columns:].mul_(scales[:, -1:])
    return values


def to_float32(weight: Tensor) -> Tensor:
    """FP8 numbers as float32, by table lookup: four times as fast on a CPU as torch's conversion."""
    import torch

    table = torch.arange(256, dtype=torch.uint8, device=weight.device).view(weight.dtype).float()
    return table.index_select(0, weight.view(torch.uint8).flatten().int()).view(weight.shape)


def e8m0_to_float32(exponents: Tensor) -> Tensor:
    """E8M0 scales (uint8) as float32: 2^(e - 127); 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1)."""
    import torch

    bits = (exponents.int() << 23).masked_fill_(exponents == 0, 1 << 22)  # 2^-127 is subnormal in float32
    return bits.view(torch.float32).masked_fill_(exponents == 255, torch.nan)


def quantize(values: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    """(E4M3 codes, float32 scales) of float32 rows that start at a block; blocks at the edges may be smaller.

    A block's largest magnitude becomes 448. The rule is that of transformers' Fp8Quantize
    (integrations/finegrained_fp8.py), which stores the inverse of the factor. Unlike there, a block whose factor
    exceeds float32 becomes zero instead of NaN.
    """
    import torch

    rows, columns = values.shape
    blocks = _in_blocks(values, block_rows, block_columns)
    factors = _factors(blocks)
    codes = (blocks * factors[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(len(blocks) * block_rows, -1)[:rows, :columns], 1.0 / factors


def block_scales(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """The scales of `quantize` without the codes."""
    return 1.0 / _factors(_in_blocks(values, block_rows, block_columns))


def _in_blocks(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """(blocks down, block_rows, blocks across, block_columns), padded with zeros."""
    import torch

    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % block_columns, 0, -rows % block_rows))
    return padded.view(-(-rows // block_rows), block_rows, -(-columns // block_columns), block_columns)


def _factors(blocks: Tensor) -> Tensor:
    """(blocks down, blocks across): the factor that scales each block's largest magnitude to 448."""
    import torch

    absmax = blocks.abs().amax(dim=(1, 3))
    return torch.where(absmax > MIN_ABSMAX, E4M3_MAX / absmax, 1.0)
