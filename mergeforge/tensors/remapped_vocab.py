"""An embedding or head with the rows of the output's tokenizer: rows picked from those of the merge's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo, split_into_tiles
from mergeforge.errors import SourceError
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor, any_needs_stats, collect_stats
from mergeforge.tensors.row_gather import RowGather, StagedRows
from mergeforge.tokenizer.settings import RowPicks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

INDEX_NBYTES = 32  # for each row of a tile: where it comes from and where it goes
LIVE = 2  # the block, and the rows that go into it


@dataclass(frozen=True, eq=False)
class RemappedVocab:
    """Rows of several ways: each the mean of those that `origins` name; the last `padding` the mean of all others.

    Its origins have rows of their own numbers, so it lets them learn itself and has no `parts`.
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
        inside = [origin.memory_cost for origin in self.origins]
        staged = self._sum([origin.row_nbytes for origin in self.origins])
        return MemoryCost(
            row_nbytes=int(staged.max(initial=0)) + INDEX_NBYTES * (len(self.origins) + 1),
            fixed_nbytes=ALIGNMENT * len(self.origins)
            + 16 * self.info.columns
            + max((one.fixed_nbytes for one in inside), default=0),
            scratch_blocks=LIVE + max((one.scratch_blocks for one in inside), default=0),
        )

    def collect_stats(self, scan: StatsPass) -> Any:
        """Let the origins learn; the mean of the rows for the padding."""
        for way in (origin.tensor for origin in self.origins):
            if any_needs_stats(way):
                tiles = [range(tile.start, tile.stop) for tile in split_into_tiles(way.info, 1)]
                scan.worker.clear()
                collect_stats(way, StatsPass(way.info, tiles, scan.worker, scan.facts, scan.dtype))
                scan.worker.clear()
        return self._mean(scan) if self.padding else None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        staged = [origin.load(rows, worker, facts, dtype, id(self)) for origin in self.origins]
        counts = self._sum([1] * len(self.origins), rows)
        slot = worker.next_slot()
        mean = facts.get(id(self))

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            _fill(into, staged, counts[start - rows.start : stop - rows.start], start - rows.start)
            if mean is not None and stop > self._padded_from:
                into[max(self._padded_from - start, 0) :] = mean
            return into

        return block

    @property
    def _padded_from(self) -> int:
        return self.info.rows - self.padding

    def _sum(self, of_each: list[int], rows: range | None = None) -> NDArray[np.int64]:
        """For each row the sum of a number over the origins that it comes from."""
        import numpy as np

        rows = rows if rows is not None else range(self.info.rows)
        total = np.zeros(len(rows), dtype=np.int64)
        for origin, number in zip(self.origins, of_each, strict=True):
            total += (origin.rows[rows.start : rows.stop] >= 0) * number
        return total

    def _mean(self, scan: StatsPass) -> Tensor:
        """The mean of all rows but the padding, summed up in float64 (mergekit/tokenizer/embed.py)."""
        import torch

        total = torch.zeros(self.info.columns, dtype=torch.float64, device=scan.worker.device)
        for block, start, stop in scan(lambda tile: self.load(tile, scan.worker, scan.facts, scan.dtype)):
            if start < self._padded_from:
                total += block(start, stop)[: self._padded_from - start].sum(0, dtype=torch.float64)
        return (total / self._padded_from).to(scan.dtype)


def remap_vocab(name: str, picks: RowPicks, ways: Mapping[str, LazyTensor]) -> LazyTensor:
    """A model's tensor `name` for the output's tokenizer; its own way where nothing changes.

    `ways`: a model's label -> how this tensor comes about there. Raises SourceError where shapes do not fit.
    """
    infos = [ways[label].info for label in picks.sources] or [next(iter(ways.values())).info]
    for label, own in zip(picks.sources, infos, strict=False):
        _check(name, label, own, infos[0], picks)
    if len(picks.sources) == 1 and _is_identity(infos[0], picks):
        return ways[next(iter(picks.sources))]
    dtypes = {info.dtype for info in infos}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    info = replace(infos[0], name=name, dtype=dtype, shape=(picks.size, *infos[0].shape[1:]))
    origins = (RowGather(_plain(ways[label]), rows, info.block_rows) for label, rows in picks.sources.items())
    return RemappedVocab(info, tuple(origins), picks.padding)


def _plain(way: LazyTensor) -> LazyTensor:
    """A way without its other names, so that a stored tensor is seen as one."""
    while isinstance(way, AliasTensor):
        way = way.way
    return way


def _check(name: str, label: str, info: TensorInfo, like: TensorInfo, picks: RowPicks) -> None:
    highest = int(picks.sources[label].max(initial=-1))
    if not info.is_float or len(info.shape) > 2 or info.shape[1:] != like.shape[1:]:
        text = f"{label}: {name} is {info.dtype} {list(info.shape)}, which cannot be mapped to the tokenizer's tokens"
        raise SourceError(text, hint=f"{name} must be floats of one width ({list(like.shape[1:])}) in every model")
    if highest >= info.rows:
        text = f"{label}: {name} has {info.rows} rows, fewer than its tokenizer has tokens ({highest + 1})"
        raise SourceError(text, hint="the head and the embedding of a model must have equally many rows")


def _is_identity(info: TensorInfo, picks: RowPicks) -> bool:
    import numpy as np

    same = info.rows == picks.size and not picks.padding
    return same and all(bool((rows == np.arange(picks.size)).all()) for rows in picks.sources.values())


def _fill(into: Tensor, staged: list[StagedRows], counts: NDArray[np.int64], first: int) -> None:
    """A block out of staged rows: zeros, single rows and means."""
    import torch

    if not counts.all():
        into.zero_()
    several = counts.max(initial=0) > 1
    if several:
        into.zero_()
    for one in staged:
        one.put(into, first, add=several)
    if several:
        into.div_(torch.from_numpy(counts.clip(1)).to(into.device, into.dtype).unsqueeze(1))
