"""8-bit floats with a scale for the tensor, for each row, or for each block of rows and columns.

The value is weight * scale, be the scale called `weight_scale` or `weight_scale_inv` (DeepSeek-V3's
config and transformers' integrations/finegrained_fp8.py say so). Blocks at the edges may be ragged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0  # of E4M3's numbers
TINIEST = 1e-35  # 448 / 1e-36 is beyond float32


def dequantize(weight: Tensor, scales: Tensor, block_columns: int) -> Tensor:
    """Rows of FP8 weights times `scales`: (rows, blocks of a row), or one number for all."""
    values = to_float32(weight)
    columns = values.shape[1]
    if scales.numel() == 1 or scales.shape[1] == 1:
        return values.mul_(scales.view(-1, 1))
    whole = columns // block_columns * block_columns
    values[:, :whole].view(len(values), -1, block_columns).mul_(scales[:, : whole // block_columns, None])
    if whole < columns:
        values[:, whole:].mul_(scales[:, -1:])
    return values


def to_float32(weight: Tensor) -> Tensor:
    """FP8 numbers as float32, looked up: four times as fast on a CPU as torch's own conversion."""
    import torch

    table = torch.arange(256, dtype=torch.uint8, device=weight.device).view(weight.dtype).float()
    return table.index_select(0, weight.view(torch.uint8).flatten().int()).view(weight.shape)


def e8m0_to_float32(exponents: Tensor) -> Tensor:
    """E8M0 scales (uint8) as float32: 2^(e - 127); 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1)."""
    import torch

    bits = (exponents.int() << 23).masked_fill_(exponents == 0, 1 << 22)  # 2^-127 has no exponent of its own
    return bits.view(torch.float32).masked_fill_(exponents == 255, torch.nan)


def quantize(values: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """(E4M3 codes, float32 scales) of float32 rows that begin with a block; blocks at the edges may be ragged.

    A block's largest magnitude becomes 448. The rule is transformers' Fp8Quantize
    (integrations/finegrained_fp8.py), which inverts the factor before it stores it. Unlike there, a block
    whose factor float32 cannot hold becomes zero, not NaN.
    """
    import torch

    rows, columns = values.shape
    blocks = _in_blocks(values, high, wide)
    factors = _factors(blocks)
    codes = (blocks * factors[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(len(blocks) * high, -1)[:rows, :columns], 1.0 / factors


def block_scales(values: Tensor, high: int, wide: int) -> Tensor:
    """quantise's scales without the codes."""
    return 1.0 / _factors(_in_blocks(values, high, wide))


def _in_blocks(values: Tensor, high: int, wide: int) -> Tensor:
    """(blocks down, high, blocks across, wide); what is beyond the edges is zero."""
    import torch

    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
    return padded.view(-(-rows // high), high, -(-columns // wide), wide)


def _factors(blocks: Tensor) -> Tensor:
    """(blocks down, blocks across): what takes each block's largest magnitude to 448."""
    import torch

    largest = blocks.abs().amax(dim=(1, 3))
    return torch.where(largest > TINIEST, LARGEST / largest, 1.0)
