"""arcee_fusion: take over only the most important changes, by size and by how they shift a row's distribution.

Arcee AI's method, as mergekit defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.methods import Block, BlockScan, method
from mergeforge.methods._kth_largest import SEARCH_NBYTES
from mergeforge.methods._thresholds import sample_magnitude_bits, sample_whole_tensor, thresholds_of_largest
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
SOFTENING = 1e-8
CACHED_ROWS = 1 << 18  # rows whose divergence is cached: 1 MB


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

    def of(self, models: list[Tensor], block: Block) -> Tensor:
        """The importance of a block's elements."""
        import torch

        divergence = self.divergence(models, block)
        base, other = models
        if not bindings.is_supported(base, other):
            return (other - base).abs_().mul_(divergence)
        out = torch.empty_like(base)
        rows = len(divergence)
        bindings.kernels().importance(base, other, divergence, rows, base.numel() // rows, out)
        return out

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


def importance_threshold(scan: BlockScan, numel: int) -> Importance:
    """median + 1.5 (third - first quartile) of the importance over the whole tensor, in float32.

    Quartiles are those at the ranks floor(q (n - 1)).
    """
    import numpy as np

    importance = Importance()
    if not numel:
        return importance
    negative, samples = sample_whole_tensor(scan(importance.of), numel, lambda values: int(values.lt_(0).sum()))
    ranks = [int(quartile * (numel - 1)) for quartile in QUARTILES]
    is_negative = [rank < negative for rank in ranks]
    counts = {at: rank + 1 if is_negative[at] else numel - rank for at, rank in enumerate(ranks)}
    parts = dict(zip(is_negative, _signed_parts(samples, is_negative), strict=True))
    bits = {sign: sample_magnitude_bits(part, 1, 1) for sign, part in parts.items()}
    samples_by_rank = {at: bits[sign] for at, sign in enumerate(is_negative)}
    del samples, parts, bits
    thresholds = thresholds_of_largest(_importance_scan(scan, importance, is_negative), numel, counts, samples_by_rank)
    values = (-thresholds[at].value if is_negative[at] else thresholds[at].value for at in range(len(ranks)))
    first, median, third = map(np.float32, values)
    importance.threshold = float(median + np.float32(1.5) * (third - first))
    return importance


def _importance_scan(scan: BlockScan, importance: Importance, is_negative: list[bool]) -> Any:
    """Scan the importance as one input for each rank: the negative part for a rank below zero, else the positive."""

    def scan_importance(visit: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return scan(
            lambda models, block: visit(_signed_parts(importance.of(models, block), is_negative), block), sample
        )

    return scan_importance


def _signed_parts(importance: Tensor, is_negative: list[bool]) -> list[Tensor]:
    """The magnitudes of the negative or of the positive importance, one for each rank; overwrites the importance."""
    negative = importance.neg().clamp_(min=0) if any(is_negative) else importance
    positive = importance.clamp_(min=0)
    return [negative if sign else positive for sign in is_negative]


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
    base, other = models
    if bindings.is_supported(base, other):
        divergence = stats.divergence(models, block)
        rows = len(divergence)
        bindings.kernels().important(base, other, divergence, rows, base.numel() // rows, stats.threshold)
        return other
    mask = stats.of(models, block).ge_(stats.threshold)
    return other.sub_(base).mul_(mask).add_(base)
