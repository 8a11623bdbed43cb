"""bitsandbytes' 4-bit types: each weight is one of 16 levels, times the largest magnitude (absmax) of its block of 64.

QLoRA (arXiv 2305.14314). Blocks run over the flat tensor, regardless of its rows. With double quantization the absmax
values are themselves 8-bit codes in blocks of 256, after their mean over the whole tensor is subtracted. The rules are
those of bitsandbytes' torch kernels (backends/default/ops.py) and CUDA kernels; its C++ kernel for CPUs rounds the
8-bit codes through a coarser table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share an absmax of their own
SMALLEST = 1e-38  # the divisor of a block of zeros
LOOKUP_CHUNK = 1 << 15  # weights that are looked up at a time; they fit into the processor's cache
ABSMAX_CHUNK = 1 << 18  # absmax values that are quantized at a time; a multiple of NESTED
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def repeat_scales(scales: Tensor, first: int, count: int, block: int) -> Tensor:
    """One scale for each of `count` weights; `scales` starts with that of weight `first`'s block."""
    skip = first % block
    return scales.repeat_interleave(block)[skip : skip + count]


def scale_blocks(values: Tensor, scales: Tensor, first: int, block: int) -> Tensor:
    """Multiply flat values by their blocks' scales, in place; `first` is the flat index of values[0]."""
    if first % block == 0 and len(values) % block == 0:
        values.view(-1, block).mul_(scales[: len(values) // block, None])
        return values
    return values.mul_(repeat_scales(scales, first, len(values), block))


def dequantize_absmax(
    codes: Tensor, levels: Tensor, nested_absmax: Tensor, offset: float | Tensor, first: int
) -> Tensor:
    """Absmax values from their 8-bit codes (uint8); `first` is the index of codes[0].

    levels (256,) and nested_absmax, which starts with the block of codes[0], are float32. The product and the sum are
    rounded one after the other.
    """
    return scale_blocks(levels.index_select(0, codes.int()), nested_absmax, first, ABSMAX_BLOCK).add_(offset)


def block_absmax(values: Tensor) -> Tensor:
    """The absmax of each block of flat float32 values; the last block may be shorter."""
    import torch

    rest = len(values) % BLOCK
    full_blocks = values[: len(values) - rest].view(-1, BLOCK).abs().amax(dim=1)
    return torch.cat([full_blocks, values[len(values) - rest :].abs().amax().view(1)]) if rest else full_blocks


def round_to_nf4(values: Tensor, absmax: Tensor, first: int, total: int) -> Tensor:
    """The nearest NF4 levels of flat float32 values divided by their blocks' absmax.

    `first` is the flat index of values[0], `total` the number of values of the tensor. Overwrites values.
    """
    import torch

    tail = max(
        total - total % BLOCK - first, 0
    )  # the last, shorter block is divided; the others are multiplied by the inverse
    rest = values[tail:] / absmax[-1].clamp(min=SMALLEST)
    scale_blocks(values, 1.0 / absmax.clamp(min=SMALLEST), first, BLOCK)
    values[tail:] = rest
    bounds, below = _cells(values.device)
    levels = torch.tensor(NF4, device=values.device)
    for start in range(0, len(values), LOOKUP_CHUNK):
        chunk = values[start : start + LOOKUP_CHUNK].clamp_(-1, 1)
        cells = _cell(chunk).clamp_(0, 64)  # NaN (its absmax is NaN too) is in no cell
        codes = below.index_select(0, cells).add_(chunk > bounds.index_select(0, cells))
        torch.index_select(levels, 0, codes, out=chunk)
    return values


def _cell(values: Tensor) -> Tensor:
    """The index of the even cell, of 65 from -1 to 1, that each number is in; monotonic."""
    return ((values + 1) * 32).int()


def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell: the bound between two levels that lies in it (else 2), and the number of bounds in earlier cells.

    No two bounds share a cell. So the lookup is exact, and ten times as fast as torch's bucketize.
    """
    import torch

    levels = torch.tensor(NF4, device=device)
    between = (levels[:-1] + levels[1:]) / 2
    cells = _cell(between).long()
    bounds = torch.full((65,), 2.0, device=device).index_copy_(0, cells, between)
    below = (cells < torch.arange(65, device=device)[:, None]).sum(1, dtype=torch.int32)
    return bounds, below


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, absmax of their blocks, offset) of all absmax values of a tensor. Overwrites them."""
    import torch

    offset = absmax.mean()
    absmax.sub_(offset)
    levels = dynamic_map(absmax.device)
    bounds = (levels[:-1] + levels[1:]) / 2
    codes, nested_absmax = [], []
    for start in range(0, len(absmax), ABSMAX_CHUNK):
        chunk = absmax[start : start + ABSMAX_CHUNK]
        chunk_absmax = _nested_absmax(chunk)
        tail = len(chunk) - len(chunk) % ABSMAX_BLOCK
        rest = chunk[tail:] / chunk_absmax[-1].clamp(min=SMALLEST)
        scale_blocks(chunk, 1.0 / chunk_absmax.clamp(min=SMALLEST), 0, ABSMAX_BLOCK)
        chunk[tail:] = rest
        codes.append(torch.bucketize(chunk.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8))
        nested_absmax.append(chunk_absmax)
    return torch.cat(codes), torch.cat(nested_absmax), offset


def _nested_absmax(absmax: Tensor) -> Tensor:
    import torch

    rest = len(absmax) % ABSMAX_BLOCK
    full_blocks = absmax[: len(absmax) - rest].view(-1, ABSMAX_BLOCK).abs().amax(dim=1)
    last = absmax[len(absmax) - rest :].abs().amax().clamp(min=SMALLEST).view(1) if rest else absmax[:0]
    return torch.cat([full_blocks, last])


def dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels of bitsandbytes' dynamic 8-bit type (arXiv 1511.04561, create_dynamic_map), ascending, float32."""
    import torch

    positive: list[float] = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        positive += (10 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    levels = sorted([*positive, *(-level for level in positive), 0.0, 1.0])
    return torch.tensor(levels, dtype=torch.float32, device=device)
