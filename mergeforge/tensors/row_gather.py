"""Rows of one tensor, picked by their numbers.

Rows of a stored tensor are read one run of neighbours at a time, and so is the result of an earlier
merge computed, where its method only looks at elements. What any other way does (an embedding with a
LoRA folded in, a random mask) may depend on where its blocks begin: it is computed in whole blocks, one
after the other, and the wanted rows of each are kept. Where most rows keep their order, as in a
vocabulary that others are added to, each block is computed once; in a shuffled one, once for each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import DTYPES, dtype_name
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker, view_rows
from mergeforge.tensors.lazy import Stats, LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

WIDEST = 8  # bytes of an element that is computed
PIECES = 64  # of the staging buffer, that computing one block of a part may take


@dataclass(frozen=True, eq=False)
class RowGather:
    """One way and, for every output row, the row of it that the output takes; -1: none.

    `block_rows`: of the output, for those of its blocks that begin a tile.
    """

    tensor: LazyTensor
    rows: NDArray[np.int32]
    block_rows: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of a staged row."""
        info = self.tensor.info
        return info.row_nbytes if isinstance(self.tensor, StoredTensor) else info.columns * WIDEST

    @property
    def memory_cost(self) -> MemoryCost:
        """What computing one block of the way takes; live in the output's blocks."""
        if isinstance(self.tensor, StoredTensor):
            return MemoryCost()
        inside, rows = self.tensor.memory_cost, self.tensor.info.block_rows
        live = -(-(inside.scratch_blocks + 1) * rows // max(self.block_rows, 1))
        return MemoryCost(
            fixed_nbytes=inside.row_nbytes * rows + inside.fixed_nbytes + ALIGNMENT * PIECES, scratch_blocks=live
        )

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype, key: int) -> StagedRows:
        """The tile's rows that come from here."""
        import numpy as np

        wanted = self.rows[rows.start : rows.stop]
        places = np.flatnonzero(wanted >= 0)
        numbers = wanted[places]
        stored = isinstance(self.tensor, StoredTensor)
        kind = self.tensor.info.dtype if stored else dtype_name(dtype)
        row_nbytes = self.tensor.info.columns * DTYPES[kind][0] // 8

        def make() -> Tensor:
            piece, there = worker.allocate_tensor(len(numbers) * row_nbytes)
            if isinstance(self.tensor, StoredTensor):
                _read(self.tensor, numbers, piece)
                return there if there is piece else there.copy_(piece, non_blocking=True)
            tile = view_rows(there, kind, self.tensor.info.columns)
            _compute(self.tensor, numbers, (places + rows.start) // self.block_rows, tile, worker, facts)
            return there

        raw = worker.cached((key, id(self), rows), make)
        return StagedRows(places, view_rows(raw, kind, self.tensor.info.columns))


@dataclass(frozen=True, eq=False)
class StagedRows:
    """Rows of a tile: where they go, ascending, and what they hold."""

    places: NDArray[np.int64]
    rows: Tensor

    def put(self, into: Tensor, first: int, *, add: bool) -> None:
        """Set (or `add`) the rows that belong into a block, which begins at the tile's row `first`."""
        import numpy as np
        import torch

        low, high = np.searchsorted(self.places, [first, first + len(into)])
        if high - low == len(into):
            if add:
                into.add_(self.rows[low:high])
            else:
                into.copy_(self.rows[low:high])
        elif high > low:
            at = torch.from_numpy(self.places[low:high] - first).to(into.device)
            rows = self.rows[low:high].to(into.dtype)
            if add:
                into.index_add_(0, at, rows)
            else:
                into.index_copy_(0, at, rows)


def _read(way: StoredTensor, numbers: NDArray[np.int32], into: Tensor) -> None:
    """Rows of a stored tensor, in the order in which they are wanted; neighbours in one read."""
    nbytes = way.info.row_nbytes
    buffer = into.numpy().data
    done = 0
    for first, count in _runs(numbers):
        way.file.read_into(buffer[done : done + count * nbytes], way.offset + first * nbytes)
        done += count * nbytes


def _compute(
    way: LazyTensor, numbers: NDArray[np.int32], blocks: NDArray[np.int64], into: Tensor, worker: Worker, facts: Stats
) -> None:
    """Rows of any way, piece by piece; `blocks`: the output's, which each belongs to."""
    import numpy as np
    import torch

    mark = worker.mark()
    for rows, here in _in_runs(numbers, blocks) if _by_element(way) else _in_blocks(way, numbers):
        value = way.load(rows, worker, facts, into.dtype)(rows.start, rows.stop)
        wanted = torch.from_numpy(numbers[here].astype(np.int64) - rows.start).to(into.device)
        into.index_copy_(0, torch.from_numpy(here).to(into.device), value.index_select(0, wanted))
        worker.release(mark)


def _by_element(way: LazyTensor) -> bool:
    """Whether any rows can be computed by themselves: nothing looks at where a block begins."""
    if isinstance(way, MergedTensor):
        return "block" not in way.method.wants and all(map(_by_element, way.inputs))
    return isinstance(way, StoredTensor) or (isinstance(way, AliasTensor) and _by_element(way.way))


def _in_blocks(way: LazyTensor, numbers: NDArray[np.int32]) -> Iterator[tuple[range, NDArray[np.int64]]]:
    """The blocks that hold wanted rows, and which of the rows each holds."""
    import numpy as np

    height = way.info.block_rows
    blocks = numbers // height
    for block in np.unique(blocks).tolist():
        yield range(block * height, min((block + 1) * height, way.info.rows)), np.flatnonzero(blocks == block)


def _in_runs(numbers: NDArray[np.int32], blocks: NDArray[np.int64]) -> Iterator[tuple[range, NDArray[np.int64]]]:
    """Runs of neighbours; they end where a block of the output does, so that tiles do not show in the last bits."""
    import numpy as np

    done = 0
    for first, count in _runs(numbers, blocks):
        yield range(first, first + count), np.arange(done, done + count)
        done += count


def _runs(numbers: NDArray[np.int32], blocks: NDArray[np.int64] | None = None) -> Iterator[tuple[int, int]]:
    """Numbers as (first, count) of those that follow one another, within the same of `blocks`."""
    import numpy as np

    if not len(numbers):
        return
    apart = np.diff(numbers) != 1
    if blocks is not None:
        apart |= np.diff(blocks) != 0
    breaks = np.flatnonzero(apart) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        yield int(numbers[start]), int(stop - start)
