"""bitsandbytes' 4-bit types: a level of 16 for each weight, times the largest magnitude of its 64.

QLoRA (arXiv 2305.14314). The blocks run over the flat tensor, whatever its rows are. With "double
quantisation" the magnitudes themselves are 8-bit codes in blocks of 256, after their mean over the whole
tensor is taken off. The rules are those of bitsandbytes' torch kernels (backends/default/ops.py), which
are its CUDA kernels' too; its C++ kernel for CPUs rounds the 8-bit codes through a coarser table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # weights that share a magnitude
ABSMAX_BLOCK = 256  # magnitudes that share one of theirs
SMALLEST = 1e-38  # what a block of zeros is divided by
LOOKUP_CHUNK = 1 << 15  # weights that are looked up at a time, within the processor's cache
ABSMAX_CHUNK = 1 << 18  # magnitudes that are quantised at a time; a multiple of NESTED
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def repeat_scales(scales: Tensor, first: int, count: int, block: int) -> Tensor:
    """One scale for each of `count` weights; `scales` begins with that of weight `first`'s block."""
    skip = first % block
    return scales.repeat_interleave(block)[skip : skip + count]


def scale_blocks(values: Tensor, scales: Tensor, first: int, block: int) -> Tensor:
    """Flat values times their blocks' scales, in place; `first` is the flat index of values[0]."""
    if first % block == 0 and len(values) % block == 0:
        values.view(-1, block).mul_(scales[: len(values) // block, None])
        return values
    return values.mul_(repeat_scales(scales, first, len(values), block))


def dequantize_absmax(codes: Tensor, levels: Tensor, largest: Tensor, offset: float | Tensor, first: int) -> Tensor:
    """Magnitudes from their 8-bit codes (uint8); `first` is the index of codes[0], `largest` begins with its block's.

    levels (256,), largest: float32. The product and the sum are rounded one after the other.
    """
    return scale_blocks(levels.index_select(0, codes.int()), largest, first, ABSMAX_BLOCK).add_(offset)


def block_absmax(values: Tensor) -> Tensor:
    """The largest magnitude of each 64 of flat float32 values; the last block may be shorter."""
    import torch

    rest = len(values) % BLOCK
    whole = values[: len(values) - rest].view(-1, BLOCK).abs().amax(dim=1)
    return torch.cat([whole, values[len(values) - rest :].abs().amax().view(1)]) if rest else whole


def round_to_nf4(values: Tensor, largest: Tensor, first: int, total: int) -> Tensor:
    """NF4 levels of flat float32 values, as if they were divided by their blocks' `largest`.

    `first` is the flat index of values[0], `total` how many the tensor has. Overwrites values.
    """
    import torch

    tail = max(total - total % BLOCK - first, 0)  # a last, shorter block is divided, the others are multiplied
    rest = values[tail:] / largest[-1].clamp(min=SMALLEST)
    scale_blocks(values, 1.0 / largest.clamp(min=SMALLEST), first, BLOCK)
    values[tail:] = rest
    bounds, below = _cells(values.device)
    levels = torch.tensor(NF4, device=values.device)
    for start in range(0, len(values), LOOKUP_CHUNK):
        piece = values[start : start + LOOKUP_CHUNK].clamp_(-1, 1)
        cells = _cell(piece).clamp_(0, 64)  # NaN, whose magnitude is NaN too, lies in none
        codes = below.index_select(0, cells).add_(piece > bounds.index_select(0, cells))
        torch.index_select(levels, 0, codes, out=piece)
    return values


def _cell(values: Tensor) -> Tensor:
    """In which of 65 even cells numbers from -1 to 1 lie; larger ones never in an earlier cell."""
    return ((values + 1) * 32).int()


def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell: the bound between two levels that lies in it (else 2), and how many lie in earlier ones.

    No two bounds share a cell. So a level is found exactly, ten times as fast as by torch's bucketize.
    """
    import torch

    levels = torch.tensor(NF4, device=device)
    between = (levels[:-1] + levels[1:]) / 2
    cells = _cell(between).long()
    bounds = torch.full((65,), 2.0, device=device).index_copy_(0, cells, between)
    below = (cells < torch.arange(65, device=device)[:, None]).sum(1, dtype=torch.int32)
    return bounds, below


def quantize_absmax(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, their blocks' largest, offset) of all magnitudes of a tensor. Overwrites them."""
    import torch

    offset = largest.mean()
    largest.sub_(offset)
    levels = dynamic_map(largest.device)
    bounds = (levels[:-1] + levels[1:]) / 2
    codes, tops = [], []
    for start in range(0, len(largest), ABSMAX_CHUNK):
        piece = largest[start : start + ABSMAX_CHUNK]
        top = _block_tops(piece)
        tail = len(piece) - len(piece) % ABSMAX_BLOCK
        rest = piece[tail:] / top[-1].clamp(min=SMALLEST)
        scale_blocks(piece, 1.0 / top.clamp(min=SMALLEST), 0, ABSMAX_BLOCK)
        piece[tail:] = rest
        codes.append(torch.bucketize(piece.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8))
        tops.append(top)
    return torch.cat(codes), torch.cat(tops), offset


def _block_tops(piece: Tensor) -> Tensor:
    import torch

    rest = len(piece) % ABSMAX_BLOCK
    whole = piece[: len(piece) - rest].view(-1, ABSMAX_BLOCK).abs().amax(dim=1)
    last = piece[len(piece) - rest :].abs().amax().clamp(min=SMALLEST).view(1) if rest else piece[:0]
    return torch.cat([whole, last])


def dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels of bitsandbytes' dynamic 8-bit type (arXiv 1511.04561), ascending, float32."""
    import torch

    positive: list[float] = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        positive += (10 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    levels = sorted([*positive, *(-level for level in positive), 0.0, 1.0])
    return torch.tensor(levels, dtype=torch.float32, device=device)
