"""A 16-bit tensor as QLoRA's training saw it: quantised to NF4 and back, in memory, never written as NF4.

An adapter that was trained on an NF4 base corrects that base's rounding too. Merged into the original
weights it corrects what is not there; merged into these it gives exactly the model that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.quant_codecs import nf4
from mergeforge.tensors.budget import MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LIVE = 3  # blocks besides the input: codes, levels, and a magnitude for each where blocks do not fit


@dataclass(frozen=True)
class Statistics:
    """What is learnt of a whole tensor: its magnitudes, where a block may begin inside one; their codes, if nested."""

    largest: Tensor | None
    nested: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class FakeQuantizedTensor:
    """`way`'s values after bitsandbytes' NF4, blocks of 64 over the flat tensor; its info is the way's.

    `double_quant`: the magnitudes are quantised too (bnb_4bit_use_double_quant), less their mean over
    the whole tensor, which is why it learns. The values are rounded to the way's dtype, as bitsandbytes does.
    """

    way: LazyTensor
    double_quant: bool

    @property
    def info(self) -> TensorInfo:
        return self.way.info

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.way,)

    @property
    def needs_stats(self) -> bool:
        return self.double_quant or not self._aligned

    @property
    def _aligned(self) -> bool:
        """Whether every computed block begins with one of NF4's."""
        info = self.info
        return info.block_rows == info.rows or info.block_rows * info.columns % nf4.BLOCK == 0

    @property
    def memory_cost(self) -> MemoryCost:
        count = -(-self.info.numel // nf4.BLOCK) if self.needs_stats else 0
        held = 4 * count * (1 if self._aligned else 2) + count + 4 * -(-count // nf4.NESTED)
        return self.way.memory_cost + MemoryCost(
            fixed_nbytes=held + count + 16 * min(count, nf4.PIECE), scratch_blocks=LIVE
        )

    def collect_stats(self, scan: StatsPass) -> Statistics:
        import torch

        largest = torch.zeros(-(-self.info.numel // nf4.BLOCK), device=scan.worker.device)
        for rows, start, stop in scan(lambda tile: self.way.load(tile, scan.worker, scan.facts, scan.dtype)):
            _add_magnitudes(largest, rows(start, stop).flatten().float(), start * self.info.columns)
        kept = None if self._aligned else largest.clone() if self.double_quant else largest
        return Statistics(kept, nf4.quantised_magnitudes(largest) if self.double_quant else None)

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        import torch

        plain = self.way.load(rows, worker, facts, dtype)
        learnt: Any = facts.get(id(self), Statistics(None, None))
        rounded = torch_dtype(self.info.dtype)
        levels = nf4.dynamic_map(torch.device(worker.device)) if self.double_quant else None

        def block(start: int, stop: int) -> Tensor:
            value = plain(start, stop)
            flat, first = value.flatten().float(), start * self.info.columns
            here = slice(first // nf4.BLOCK, -(-(first + len(flat)) // nf4.BLOCK))
            largest = nf4.magnitudes(flat) if learnt.largest is None else learnt.largest[here]
            scales = largest
            if learnt.nested is not None and levels is not None:
                codes, tops, offset = learnt.nested
                scales = nf4.nested_scales(codes[here], levels, tops[here.start // nf4.NESTED :], offset, here.start)
            found = nf4.nearest_levels(flat, largest, first, self.info.numel)
            return value.copy_(nf4.scaled(found, scales, first, nf4.BLOCK).to(rounded).view(value.shape))

        return block


def _add_magnitudes(largest: Tensor, values: Tensor, first: int) -> None:
    """Take flat values, the first of which has the flat index `first`, into their blocks' largest magnitudes."""
    import torch

    begin = first // nf4.BLOCK
    if first % nf4.BLOCK == 0:  # blocks that go on behind these values get their rest later
        found = nf4.magnitudes(values)
        here = largest[begin : begin + len(found)]
        torch.maximum(here, found, out=here)
        return
    places = torch.arange(first, first + len(values), device=values.device) // nf4.BLOCK - begin
    largest[begin:].scatter_reduce_(0, places, values.abs_(), "amax")
