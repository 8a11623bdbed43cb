"""RemappedVocab: an embedding or head with the rows of the output's tokenizer, gathered from the merge's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo, split_into_tiles
from mergeforge.errors import SourceError
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass, any_needs_stats, collect_stats
from mergeforge.tensors.row_gather import LoadedRows, RowGather
from mergeforge.tensors.worker import ALIGNMENT, Worker
from mergeforge.tokenizer.settings import RowSources

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

INDEX_NBYTES = 32  # per row of a tile: source row and target position
SCRATCH_BLOCKS = 2  # the block, and the rows that are written into it


@dataclass(frozen=True, eq=False)
class RemappedVocab:
    """Each row is the mean of the rows that `origins` supply; the last `padding` rows are the mean of all others.

    The origins have row numbers of their own, so this tensor collects their statistics itself and has no `inputs`.
    """

    info: TensorInfo
    origins: tuple[RowGather, ...]
    padding: int = 0

    inputs: tuple[LazyTensor, ...] = ()

    @property
    def needs_stats(self) -> bool:
        return self.padding > 0 or any(any_needs_stats(origin.tensor) for origin in self.origins)

    @property
    def memory_cost(self) -> MemoryCost:
        costs = [origin.memory_cost for origin in self.origins]
        row_nbytes = self._sum_over_origins([origin.row_nbytes for origin in self.origins])
        return MemoryCost(
            row_nbytes=int(row_nbytes.max(initial=0)) + INDEX_NBYTES * (len(self.origins) + 1),
            fixed_nbytes=ALIGNMENT * len(self.origins)
            + 16 * self.info.columns
            + max((cost.fixed_nbytes for cost in costs), default=0),
            scratch_blocks=SCRATCH_BLOCKS + max((cost.scratch_blocks for cost in costs), default=0),
        )

    def collect_stats(self, scan: StatsPass) -> Any:
        """Collect the statistics of the origins; return the mean row for the padding."""
        for tensor in (origin.tensor for origin in self.origins):
            if any_needs_stats(tensor):
                tiles = [range(tile.start, tile.stop) for tile in split_into_tiles(tensor.info, 1)]
                scan.worker.clear()
                collect_stats(tensor, StatsPass(tensor.info, tiles, scan.worker, scan.stats, scan.dtype))
                scan.worker.clear()
        return self._mean(scan) if self.padding else None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        loaded = [origin.load(rows, worker, stats, dtype, id(self)) for origin in self.origins]
        counts = self._sum_over_origins([1] * len(self.origins), rows)
        slot = worker.next_slot()
        mean = stats.get(id(self))

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            _fill_block(out, loaded, counts[start - rows.start : stop - rows.start], start - rows.start)
            if mean is not None and stop > self._padding_start:
                out[max(self._padding_start - start, 0) :] = mean
            return out

        return block

    @property
    def _padding_start(self) -> int:
        return self.info.rows - self.padding

    def _sum_over_origins(self, values: list[int], rows: range | None = None) -> NDArray[np.int64]:
        """For each row, the sum of the values (one per origin) of the origins that supply it."""
        import numpy as np

        rows = rows if rows is not None else range(self.info.rows)
        total = np.zeros(len(rows), dtype=np.int64)
        for origin, value in zip(self.origins, values, strict=True):
            total += (origin.rows[rows.start : rows.stop] >= 0) * value
        return total

    def _mean(self, scan: StatsPass) -> Tensor:
        """The mean of all rows except the padding, summed in float64 (mergekit/tokenizer/embed.py)."""
        import torch

        total = torch.zeros(self.info.columns, dtype=torch.float64, device=scan.worker.device)
        for block, start, stop in scan(lambda tile: self.load(tile, scan.worker, scan.stats, scan.dtype)):
            if start < self._padding_start:
                total += block(start, stop)[: self._padding_start - start].sum(0, dtype=torch.float64)
        return (total / self._padding_start).to(scan.dtype)


def remap_vocab(name: str, row_sources: RowSources, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    """A model's tensor `name` for the output's tokenizer; the model's own tensor if nothing changes.

    `tensors`: a model's label -> this tensor in that model. Raises SourceError if the shapes do not fit.
    """
    infos = [tensors[label].info for label in row_sources.sources] or [next(iter(tensors.values())).info]
    for label, info in zip(row_sources.sources, infos, strict=False):
        _check_shape(name, label, info, infos[0], row_sources)
    if len(row_sources.sources) == 1 and _is_identity(infos[0], row_sources):
        return tensors[next(iter(row_sources.sources))]
    dtypes = {info.dtype for info in infos}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    info = replace(infos[0], name=name, dtype=dtype, shape=(row_sources.size, *infos[0].shape[1:]))
    origins = (
        RowGather(_without_aliases(tensors[label]), rows, info.block_rows)
        for label, rows in row_sources.sources.items()
    )
    return RemappedVocab(info, tuple(origins), row_sources.padding)


def _without_aliases(tensor: LazyTensor) -> LazyTensor:
    """The tensor behind its aliases, so that a stored tensor is recognized as one."""
    while isinstance(tensor, AliasTensor):
        tensor = tensor.tensor
    return tensor


def _check_shape(name: str, label: str, info: TensorInfo, first: TensorInfo, row_sources: RowSources) -> None:
    highest = int(row_sources.sources[label].max(initial=-1))
    if not info.is_float or len(info.shape) > 2 or info.shape[1:] != first.shape[1:]:
        text = f"{label}: {name} is {info.dtype} {list(info.shape)}, which cannot be mapped to the tokenizer's tokens"
        raise SourceError(text, hint=f"{name} must have a float dtype and row shape {list(first.shape[1:])} everywhere")
    if highest >= info.rows:
        text = f"{label}: {name} has {info.rows} rows, but its tokenizer needs {highest + 1}"
        raise SourceError(text, hint="the head and the embedding of a model must have the same number of rows")


def _is_identity(info: TensorInfo, row_sources: RowSources) -> bool:
    import numpy as np

    same = info.rows == row_sources.size and not row_sources.padding
    return same and all(bool((rows == np.arange(row_sources.size)).all()) for rows in row_sources.sources.values())


def _fill_block(out: Tensor, loaded: list[LoadedRows], counts: NDArray[np.int64], first: int) -> None:
    """Fill a block from loaded rows: zeros, single rows, and means where `counts` is above 1."""
    import torch

    if not counts.all():
        out.zero_()
    has_means = counts.max(initial=0) > 1
    if has_means:
        out.zero_()
    for rows in loaded:
        rows.write_to(out, first, add=has_means)
    if has_means:
        out.div_(torch.from_numpy(counts.clip(1)).to(out.device, out.dtype).unsqueeze(1))
