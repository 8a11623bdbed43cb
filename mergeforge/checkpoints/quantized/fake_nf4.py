"""FakeQuantizedTensor: a 16-bit tensor as QLoRA training saw it, quantized to NF4 and back in memory.

An adapter trained on an NF4 base also corrects the rounding of that base. Merged into the original weights it corrects
errors that are not there; merged into these it gives exactly the model that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.quant_codecs import nf4
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCRATCH_BLOCKS = 3  # besides the input: codes, levels, and one absmax per value where NF4 blocks do not align


@dataclass(frozen=True)
class NF4Stats:
    """Statistics of a whole tensor.

    `absmax`: of every NF4 block, if computed blocks may start inside one; `nested`: its double quantization.
    """

    absmax: Tensor | None
    nested: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class FakeQuantizedTensor:
    """The tensor's values after bitsandbytes' NF4, with blocks of 64 over the flat tensor.

    `double_quant`: the absmax values are quantized too (bnb_4bit_use_double_quant), minus their mean over the whole
    tensor, which needs statistics. The result is rounded to the tensor's dtype, as bitsandbytes does.
    """

    tensor: LazyTensor
    double_quant: bool

    @property
    def info(self) -> TensorInfo:
        return self.tensor.info

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.tensor,)

    @property
    def needs_stats(self) -> bool:
        return self.double_quant or not self._aligned

    @property
    def _aligned(self) -> bool:
        """Whether every computed block starts with an NF4 block."""
        info = self.info
        return info.block_rows == info.rows or info.block_rows * info.columns % nf4.BLOCK == 0

    @property
    def memory_cost(self) -> MemoryCost:
        count = -(-self.info.numel // nf4.BLOCK) if self.needs_stats else 0
        stats_nbytes = 4 * count * (1 if self._aligned else 2) + count + 4 * -(-count // nf4.ABSMAX_BLOCK)
        return self.tensor.memory_cost + MemoryCost(
            fixed_nbytes=stats_nbytes + count + 16 * min(count, nf4.ABSMAX_CHUNK), scratch_blocks=SCRATCH_BLOCKS
        )

    def collect_stats(self, scan: StatsPass) -> NF4Stats:
        import torch

        absmax = torch.zeros(-(-self.info.numel // nf4.BLOCK), device=scan.worker.device)
        for rows, start, stop in scan(lambda tile: self.tensor.load(tile, scan.worker, scan.stats, scan.dtype)):
            _update_absmax(absmax, rows(start, stop).flatten().float(), start * self.info.columns)
        own_absmax = None if self._aligned else absmax.clone() if self.double_quant else absmax
        return NF4Stats(own_absmax, nf4.quantize_absmax(absmax) if self.double_quant else None)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        import torch

        rows_of = self.tensor.load(rows, worker, stats, dtype)
        own_stats: Any = stats.get(id(self), NF4Stats(None, None))
        result_dtype = torch_dtype(self.info.dtype)
        levels = nf4.dynamic_map(torch.device(worker.device)) if self.double_quant else None

        def block(start: int, stop: int) -> Tensor:
            value = rows_of(start, stop)
            flat, first = value.flatten().float(), start * self.info.columns
            nf4_blocks = slice(first // nf4.BLOCK, -(-(first + len(flat)) // nf4.BLOCK))
            absmax = nf4.block_absmax(flat) if own_stats.absmax is None else own_stats.absmax[nf4_blocks]
            scales = absmax
            if own_stats.nested is not None and levels is not None:
                codes, nested_absmax, offset = own_stats.nested
                begin = nf4_blocks.start
                scales = nf4.dequantize_absmax(
                    codes[nf4_blocks], levels, nested_absmax[begin // nf4.ABSMAX_BLOCK :], offset, begin
                )
            nearest = nf4.round_to_nf4(flat, absmax, first, self.info.numel)
            return value.copy_(nf4.scale_blocks(nearest, scales, first, nf4.BLOCK).to(result_dtype).view(value.shape))

        return block


def _update_absmax(absmax: Tensor, values: Tensor, first: int) -> None:
    """Update the absmax of NF4 blocks with flat values, the first of which has the flat index `first`."""
    import torch

    begin = first // nf4.BLOCK
    if first % nf4.BLOCK == 0:  # a block that continues after these values gets the rest later
        magnitudes = nf4.block_absmax(values)
        own = absmax[begin : begin + len(magnitudes)]
        torch.maximum(own, magnitudes, out=own)
        return
    index = torch.arange(first, first + len(values), device=values.device) // nf4.BLOCK - begin
    absmax[begin:].scatter_reduce_(0, index, values.abs_(), "amax")
