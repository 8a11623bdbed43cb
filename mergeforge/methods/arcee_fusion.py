"""arcee_fusion: take over only the most important changes, by size and by how they shift a row's distribution.

Arcee AI's method, as mergekit defines it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.methods import Block, Statistics, method
from mergeforge.methods.kth_largest import SEARCH_NBYTES, KthLargestSearch
from mergeforge.methods.statistics import EveryBlock
from mergeforge.methods.thresholds import Searches, find_thresholds, magnitude_array, subsample

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
SOFTENING = 1e-8
CACHED_ROWS = 1 << 18  # rows whose divergence is cached: 1 MB
PART_ELEMENTS = 1 << 16  # that a CPU computes at a time
SAMPLE_ELEMENTS = 1 << 18  # of the whole tensor: a sample of a few blocks misleads where rows differ


@dataclass
class Importance:
    """|other - base| times the KL divergence of the rows' softmax (other from base), and its threshold.

    Rounding makes some divergences of near rows negative. A vector is one row; one longer than a block counts
    as several. `divergences` caches the divergences in one array; `cached_rows` maps a block's start to its rows.
    """

    threshold: float = 0.0
    divergences: Tensor | None = None
    used: int = 0
    cached_rows: dict[int, slice] = field(default_factory=dict)

    def parts(self, models: list[Tensor], block: Block) -> Iterator[Tensor]:
        """The importance of a block's elements; on a CPU a few rows at a time, which stay in the cache."""
        for base, other, divergence in self.row_parts(models, block):
            yield (other - base).abs_().mul_(divergence)

    def row_parts(self, models: list[Tensor], block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of the base, of the other model and of the divergence."""
        divergence = self.divergence(models, block)
        base, other = (model.view(1, -1) if block.is_vector else model for model in models)
        on_cpu = base.device.type == "cpu"
        step = max(1, PART_ELEMENTS // base.shape[1]) if on_cpu else len(base)
        for start in range(0, len(base), step):
            rows = slice(start, start + step)
            yield base[rows], other[rows], divergence[rows]

    def divergence(self, models: list[Tensor], block: Block) -> Tensor:
        """The divergence of each row, as a column."""
        if self.divergences is not None and block.start in self.cached_rows:
            return self.divergences[self.cached_rows[block.start]]
        divergence = _divergence(*(model.view(1, -1) if block.is_vector else model for model in models))
        self.divergences = divergence.new_empty(CACHED_ROWS, 1) if self.divergences is None else self.divergences
        rows = slice(self.used, self.used + len(divergence))
        if rows.stop <= CACHED_ROWS:
            self.divergences[rows] = divergence
            self.cached_rows[block.start], self.used = rows, rows.stop
        return divergence


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    """The KL divergence of each row, as a column."""
    import torch

    p, q = (rows.softmax(dim=-1).add_(SOFTENING) for rows in (other, base))
    return p.mul_(torch.div(p, q, out=q).log_()).sum(dim=-1, keepdim=True)


def importance_threshold(tensor: Statistics) -> Importance:
    """median + 1.5 (third - first quartile) of the importance over the whole tensor, in float32.

    Quartiles are those at the ranks floor(q (n - 1)).
    """
    import numpy as np

    importance, numel = Importance(), tensor.numel
    if not numel:
        return importance
    negative, samples = _sample(tensor, importance)
    ranks = [int(quartile * (numel - 1)) for quartile in QUARTILES]
    # A rank below zero is searched among the magnitudes of the negative numbers, in the other direction.
    signs = [-1 if rank < negative else 1 for rank in ranks]
    searches = [
        (sign, KthLargestSearch(rank + 1 if sign < 0 else numel - rank, numel))
        for sign, rank in zip(signs, ranks, strict=True)
    ]
    thresholds = find_thresholds(
        searches,
        lambda numbers: [magnitude_array(_of_sign(samples, sign)) for sign in numbers],
        lambda pending: _count(tensor, importance, pending),
    )
    first, median, third = (
        np.float32(sign * threshold.value) for sign, threshold in zip(signs, thresholds, strict=True)
    )
    importance.threshold = float(median + np.float32(1.5) * (third - first))
    return importance


def _sample(tensor: Statistics, importance: Importance) -> tuple[int, Tensor]:
    """The number of negative elements of the importance, and a sample of the whole tensor, flat."""
    import torch

    samples, used = torch.empty(min(tensor.numel, 2 * SAMPLE_ELEMENTS)), 0

    def visit(models: list[Tensor], block: Block) -> int:
        nonlocal used
        negative = 0
        for values in importance.parts(models, block):
            sampled = subsample(values, tensor.numel, SAMPLE_ELEMENTS)[: len(samples) - used]
            samples[used : used + len(sampled)] = sampled
            used += len(sampled)
            negative += int(values.lt_(0).sum())
        return negative

    negative = sum(tensor.collect(EveryBlock(visit)))
    return negative, samples[:used]


def _count(tensor: Statistics, importance: Importance, searches: Searches) -> None:
    def visit(models: list[Tensor], block: Block) -> None:
        for values in importance.parts(models, block):
            for sign in sorted({sign for sign, _ in searches}):
                tensor.count(_of_sign(values, sign), [search for other, search in searches if other == sign])

    tensor.collect(EveryBlock(visit))


def _of_sign(values: Tensor, sign: int) -> Tensor:
    """The magnitudes of the numbers of a sign; 0 for the others."""
    return values.neg().clamp_(min=0) if sign < 0 else values.clamp(min=0)


@method(
    "arcee_fusion",
    scratch_blocks=3,
    inputs=(2, 2),
    base_is_input=True,
    stats=importance_threshold,
    stats_nbytes=2 * SEARCH_NBYTES,
)
def arcee_fusion(models: list[Tensor], stats: Importance, block: Block) -> Tensor:
    """base + (other - base) where the importance reaches the threshold, else base."""
    for base, other, divergence in stats.row_parts(models, block):
        change = other.sub_(base)
        kept = change.abs().mul_(divergence).ge_(stats.threshold)
        change.mul_(kept).add_(base)
    return models[1]
