"""RowGather: rows of one tensor, selected by their numbers.

Rows of a stored tensor are read one run of consecutive rows at a time. The result of an earlier merge is computed in
the same runs if its method is elementwise. Anything else (an embedding with a LoRA folded in, a random mask) may
depend on where its blocks start: it is computed in whole blocks, one after the other, and only the requested rows of
each are kept. If most rows keep their order, as in a vocabulary that others are added to, each block is computed
once; in a shuffled vocabulary, once per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import DTYPES, dtype_name
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Stats
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker, view_rows

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

MAX_ITEMSIZE = 8  # bytes per computed element
MAX_ALLOCATIONS = 64  # of the staging buffer, while one block of an input is computed


@dataclass(frozen=True, eq=False)
class RowGather:
    """A tensor and, for every output row, the number of the row that is taken from it (-1: none).

    `block_rows`: rows per block of the output.
    """

    tensor: LazyTensor
    rows: NDArray[np.int32]
    block_rows: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of a staged row."""
        info = self.tensor.info
        return info.row_nbytes if isinstance(self.tensor, StoredTensor) else info.columns * MAX_ITEMSIZE

    @property
    def memory_cost(self) -> MemoryCost:
        """The cost of computing one block of the tensor, with scratch blocks counted in blocks of the output."""
        if isinstance(self.tensor, StoredTensor):
            return MemoryCost()
        cost, rows = self.tensor.memory_cost, self.tensor.info.block_rows
        scratch_blocks = -(-(cost.scratch_blocks + 1) * rows // max(self.block_rows, 1))
        return MemoryCost(
            fixed_nbytes=cost.row_nbytes * rows + cost.fixed_nbytes + ALIGNMENT * MAX_ALLOCATIONS,
            scratch_blocks=scratch_blocks,
        )

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype, key: int) -> LoadedRows:
        """Load the rows of a tile that are taken from this tensor."""
        import numpy as np

        requested = self.rows[rows.start : rows.stop]
        positions = np.flatnonzero(requested >= 0)
        numbers = requested[positions]
        stored = isinstance(self.tensor, StoredTensor)
        row_dtype = self.tensor.info.dtype if stored else dtype_name(dtype)
        row_nbytes = self.tensor.info.columns * DTYPES[row_dtype][0] // 8

        def make() -> Tensor:
            host, on_device = worker.allocate_tensor(len(numbers) * row_nbytes)
            if isinstance(self.tensor, StoredTensor):
                _read(self.tensor, numbers, host)
                return on_device if on_device is host else on_device.copy_(host, non_blocking=True)
            tile = view_rows(on_device, row_dtype, self.tensor.info.columns)
            _compute(self.tensor, numbers, (positions + rows.start) // self.block_rows, tile, worker, stats)
            return on_device

        raw = worker.cached((key, id(self), rows), make)
        return LoadedRows(positions, view_rows(raw, row_dtype, self.tensor.info.columns))


@dataclass(frozen=True, eq=False)
class LoadedRows:
    """Rows of a tile: their positions in the tile, ascending, and their values."""

    positions: NDArray[np.int64]
    rows: Tensor

    def write_to(self, block: Tensor, first: int, *, add: bool) -> None:
        """Set (or `add`) the rows that belong to a block that starts at row `first` of the tile."""
        import numpy as np
        import torch

        low, high = np.searchsorted(self.positions, [first, first + len(block)])
        if high - low == len(block):
            if add:
                block.add_(self.rows[low:high])
            else:
                block.copy_(self.rows[low:high])
        elif high > low:
            index = torch.from_numpy(self.positions[low:high] - first).to(block.device)
            rows = self.rows[low:high].to(block.dtype)
            if add:
                block.index_add_(0, index, rows)
            else:
                block.index_copy_(0, index, rows)


def _read(tensor: StoredTensor, numbers: NDArray[np.int32], out: Tensor) -> None:
    """Read rows of a stored tensor in the requested order, consecutive rows in one read."""
    nbytes = tensor.info.row_nbytes
    buffer = out.numpy().data
    done = 0
    for first, count in consecutive_runs(numbers):
        tensor.file.read_into(buffer[done : done + count * nbytes], tensor.offset + first * nbytes)
        done += count * nbytes


def _compute(
    tensor: LazyTensor,
    numbers: NDArray[np.int32],
    blocks: NDArray[np.int64],
    out: Tensor,
    worker: Worker,
    stats: Stats,
) -> None:
    """Compute rows of any tensor, range by range; `blocks`: the output block that each row belongs to."""
    import numpy as np
    import torch

    mark = worker.mark()
    for rows, positions in _by_run(numbers, blocks) if _is_elementwise(tensor) else _by_block(tensor, numbers):
        value = tensor.load(rows, worker, stats, out.dtype)(rows.start, rows.stop)
        index = torch.from_numpy(numbers[positions].astype(np.int64) - rows.start).to(out.device)
        out.index_copy_(0, torch.from_numpy(positions).to(out.device), value.index_select(0, index))
        worker.release(mark)


def _is_elementwise(tensor: LazyTensor) -> bool:
    """Whether any rows can be computed alone, because nothing depends on where a block starts."""
    if isinstance(tensor, MergedTensor):
        return not tensor.method.uses_position and all(map(_is_elementwise, tensor.inputs))
    return isinstance(tensor, StoredTensor) or (isinstance(tensor, AliasTensor) and _is_elementwise(tensor.tensor))


def _by_block(tensor: LazyTensor, numbers: NDArray[np.int32]) -> Iterator[tuple[range, NDArray[np.int64]]]:
    """The row ranges of the blocks that hold requested rows, and the positions of these in `numbers`."""
    import numpy as np

    height = tensor.info.block_rows
    blocks = numbers // height
    for block in np.unique(blocks).tolist():
        yield range(block * height, min((block + 1) * height, tensor.info.rows)), np.flatnonzero(blocks == block)


def _by_run(numbers: NDArray[np.int32], blocks: NDArray[np.int64]) -> Iterator[tuple[range, NDArray[np.int64]]]:
    """Runs of consecutive rows. A run ends with a block of the output, so that tiles do not affect the last bits."""
    import numpy as np

    done = 0
    for first, count in consecutive_runs(numbers, blocks):
        yield range(first, first + count), np.arange(done, done + count)
        done += count


def consecutive_runs(
    numbers: NDArray[np.int32] | NDArray[np.int64], blocks: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, int]]:
    """Numbers as (first, count) of runs of consecutive ones, each within one of `blocks`."""
    import numpy as np

    if not len(numbers):
        return
    is_break = np.diff(numbers) != 1
    if blocks is not None:
        is_break |= np.diff(blocks) != 0
    breaks = np.flatnonzero(is_break) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        yield int(numbers[start]), int(stop - start)
