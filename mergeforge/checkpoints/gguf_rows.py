"""Parts of a stored tensor in GGUF tensors: which bytes hold some of its rows, and their values in its own order.

A TensorTarget says how a stored tensor was written into a GGUF tensor; the classes here read it back. The values are
those of the gguf package's dequantizers (gguf-py/gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.dequantize import dequantize
from mergeforge.gguf.reader import GGUFTensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.row_gather import consecutive_runs
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCRATCH_BLOCKS = 6  # of dequantization: the bytes, integer and float temporaries, the result
READ_NBYTES = 1 << 20  # bytes of a transposed matrix that are read at once
Fill = Callable[["Tensor", int, int], None]  # writes its elements of rows [start, stop) into a block


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of a stored tensor that are rows of a GGUF tensor, in another order; values and columns may be changed."""

    info: TensorInfo
    target: TensorTarget
    stored: GGUFTensorInfo

    @property
    def numel(self) -> int:
        rows = self.info.rows if self.target.rows is None else len(self.target.rows)
        return rows * self.info.columns

    @property
    def memory_cost(self) -> MemoryCost:
        row_nbytes = self.stored.row_nbytes(self.info.columns)
        return MemoryCost(row_nbytes=row_nbytes, fixed_nbytes=ALIGNMENT, scratch_blocks=SCRATCH_BLOCKS)

    @cached_property
    def units(self) -> np.ndarray:
        """The unit that holds each row (-1: none); a unit is as wide as a row of the stored tensor."""
        import numpy as np

        first = self.target.first_element // self.info.columns
        units = np.full(self.info.rows, -1, dtype=np.int64)
        chosen = np.arange(self.info.rows) if self.target.rows is None else self.target.rows
        units[chosen] = first + np.arange(len(chosen))
        return units

    def load(self, rows: range, worker: Worker) -> Fill:
        import numpy as np

        units, size = np.sort(self.units[rows.start : rows.stop]), self.stored.row_nbytes(self.info.columns)
        units = units[np.searchsorted(units, 0) :]

        def read() -> np.ndarray:
            raw = worker.allocate(len(units) * size)
            filled = 0
            for first, count in consecutive_runs(units):
                self.stored.file.read_into(raw[filled : filled + count * size].data, self.stored.offset + first * size)
                filled += count * size
            return raw

        raw = worker.cached((id(self), rows), read).reshape(len(units), size)

        def fill(out: Tensor, start: int, stop: int) -> None:
            import torch

            wanted = self.units[start:stop]
            positions = np.flatnonzero(wanted >= 0)
            if not len(positions):
                return
            values = _restored(_values(raw[np.searchsorted(units, wanted[positions])], self.stored), self.target)
            if len(positions) == len(out):
                out.copy_(values.to(out.device))
            else:
                out[torch.from_numpy(positions).to(out.device)] = values.to(out)

        return fill


@dataclass(frozen=True, eq=False)
class TransposedRows:
    """Matrices of a stored tensor that stand transposed in a GGUF tensor; they may have only some of its columns.

    A row of the stored tensor is a column of a GGUF matrix. Of quantized matrices only the blocks that hold the columns
    of a tile are kept.
    """

    info: TensorInfo
    target: TensorTarget
    stored: GGUFTensorInfo

    @cached_property
    def columns(self) -> range:
        """The columns of the stored tensor: rows of a GGUF matrix."""
        return range(*(self.target.columns or slice(None)).indices(self.info.columns))

    @cached_property
    def chosen(self) -> np.ndarray:
        """The rows of the stored tensor that are in the GGUF tensor, in its order."""
        import numpy as np

        return np.arange(self.info.rows, dtype=np.int64) if self.target.rows is None else self.target.rows

    @property
    def numel(self) -> int:
        return len(self.chosen) * len(self.columns)

    @property
    def _block(self) -> tuple[int, int]:
        """Elements and bytes of the smallest part of a row of a GGUF matrix."""
        return self.stored.block, self.stored.block_nbytes

    @property
    def memory_cost(self) -> MemoryCost:
        block, nbytes = self._block
        ends = 4 * len(self.columns) * nbytes + READ_NBYTES + 64 * ALIGNMENT
        matrix_row = self.target.transpose // block * nbytes
        row_nbytes = -(-len(self.columns) * nbytes // block) + ALIGNMENT
        return MemoryCost(row_nbytes=row_nbytes, fixed_nbytes=ends + matrix_row, scratch_blocks=SCRATCH_BLOCKS)

    def load(self, rows: range, worker: Worker) -> Fill:
        import numpy as np

        positions = np.flatnonzero((self.chosen >= rows.start) & (self.chosen < rows.stop))
        parts: dict[int, tuple[int, np.ndarray]] = {}
        for matrix in np.unique(positions // self.target.transpose):
            inside = positions[positions // self.target.transpose == matrix] % self.target.transpose
            first, last = int(inside.min()) // self._block[0], int(inside.max()) // self._block[0] + 1
            parts[int(matrix)] = first, self._read(int(matrix), first, last, worker)

        def fill(out: Tensor, start: int, stop: int) -> None:
            import torch

            here = positions[(self.chosen[positions] >= start) & (self.chosen[positions] < stop)]
            columns = slice(self.columns.start, self.columns.stop, self.columns.step)
            for matrix in np.unique(here // self.target.transpose):
                mine = here[here // self.target.transpose == matrix]
                values = self._columns(parts[int(matrix)], mine % self.target.transpose)
                at = torch.from_numpy(self.chosen[mine] - start).to(out.device)
                out[:, columns][at] = values.to(out)

        return fill

    def _read(self, matrix: int, first: int, last: int, worker: Worker) -> np.ndarray:
        """Blocks [first, last) of every row of a GGUF matrix, read some rows at a time."""
        block, nbytes = self._block
        height, size = len(self.columns), self.target.transpose // block * nbytes
        start = self.stored.offset + self._first_row * size + matrix * height * size

        def read() -> np.ndarray:
            kept = worker.allocate(height * (last - first) * nbytes).reshape(height, (last - first) * nbytes)
            mark = worker.mark()
            step = max(1, READ_NBYTES // size)
            buffer = worker.allocate(min(step, height) * size)
            for top in range(0, height, step):
                count = min(step, height - top)
                self.stored.file.read_into(buffer[: count * size].data, start + top * size)
                kept[top : top + count] = buffer[: count * size].reshape(count, size)[:, first * nbytes : last * nbytes]
            worker.release(mark)
            return kept

        return worker.cached((id(self), matrix, first, last), read)

    @property
    def _first_row(self) -> int:
        return self.target.first_element // self.target.transpose

    def _columns(self, part: tuple[int, np.ndarray], inside: np.ndarray) -> Tensor:
        """Some columns of a GGUF matrix, as rows."""
        import numpy as np

        first, kept = part
        block, nbytes = self._block
        low, high = int(inside.min()) // block, int(inside.max()) // block + 1
        raw = np.ascontiguousarray(kept[:, (low - first) * nbytes : (high - first) * nbytes])
        values = _values(raw, self.stored)[:, inside - low * block]
        return _restored(np.ascontiguousarray(values.T), self.target)


def read_rows(info: TensorInfo, target: TensorTarget, stored: GGUFTensorInfo) -> KeptRows | TransposedRows:
    """How the part of a stored tensor that is in a GGUF tensor is read."""
    return (TransposedRows if target.transpose else KeptRows)(info, target, stored)


def _values(raw: np.ndarray, stored: GGUFTensorInfo) -> np.ndarray:
    """Bytes of rows as float32."""
    import numpy as np

    values = dequantize(raw, stored.ggml_type)
    return values.astype(np.float32, copy=False)


def _restored(values: np.ndarray, target: TensorTarget) -> Tensor:
    """The values before the changes that a target describes, undone in reverse order."""
    import numpy as np
    import torch

    if target.negative_exp:
        values = _logarithm(values)
    if target.add:
        values = values - np.float32(target.add)
    for factor in reversed(target.factors):
        values = values / np.float32(factor) if factor != 1 else values
    if target.column_order is not None:
        ordered = np.empty_like(values)
        ordered[:, target.column_order] = values
        values = ordered
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _logarithm(values: np.ndarray) -> np.ndarray:
    """x where -exp(x) are the values. Several x have the same; one that 16 bits can hold is taken if there is one."""
    import numpy as np
    import torch

    wanted = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    exact = (-wanted).double().log()
    found = exact.float()
    done = torch.zeros_like(found, dtype=torch.bool)
    nearby = [exact.to(torch.bfloat16).float(), exact.to(torch.float16).float(), found]
    nearby += [torch.nextafter(found, torch.full_like(found, end)) for end in (-torch.inf, torch.inf)]
    for candidate in nearby:
        fits = (-candidate.exp() == wanted) & ~done
        found = torch.where(fits, candidate, found)
        done |= fits
    return found.numpy()
