"""arcee_fusion: take over only the changes that matter most, by size and by how they shift a row's distribution.

Arcee AI's method, as mergekit defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.methods import Block, Look, method
from mergeforge.methods._thresholds import SEARCH_NBYTES, largest, sample, survey
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
SOFTENING = 1e-8
ROWS_KEPT = 1 << 18  # whose divergence is kept: 1 MB


@dataclass
class Importance:
    """|other - base| times the KL divergence of the rows' softmax (other from base), and its threshold.

    Rounding makes some divergences of near rows negative. A vector is one row (one longer than a
    block is several). `shifts`: divergences in one piece, and in `places` where those of the block that
    starts there lie, as far as there is room.
    """

    threshold: float = 0.0
    shifts: Tensor | None = None
    used: int = 0
    places: dict[int, slice] = field(default_factory=dict)

    def of(self, models: list[Tensor], block: Block) -> Tensor:
        """The importance of a block's elements."""
        import torch

        shift = self.shift(models, block)
        base, other = models
        if not bindings.is_supported(base, other):
            return (other - base).abs_().mul_(shift)
        out = torch.empty_like(base)
        bindings.kernels().importance(base, other, shift, len(shift), base.numel() // len(shift), out)
        return out

    def shift(self, models: list[Tensor], block: Block) -> Tensor:
        """The divergence of each row, as a column."""
        if self.shifts is not None and block.start in self.places:
            return self.shifts[self.places[block.start]]
        found = _divergence(*(model.view(1, -1) if block.is_vector else model for model in models))
        self.shifts = found.new_empty(ROWS_KEPT, 1) if self.shifts is None else self.shifts
        place = slice(self.used, self.used + len(found))
        if place.stop <= ROWS_KEPT:
            self.shifts[place] = found
            self.places[block.start], self.used = place, place.stop
        return found


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    """Of each row, as a column."""
    import torch

    p, q = (one.softmax(dim=-1).add_(SOFTENING) for one in (other, base))
    return p.mul_(torch.div(p, q, out=q).log_()).sum(dim=-1, keepdim=True)


def threshold(look: Look, numel: int) -> Importance:
    """median + 1.5 (third - first quartile) of the importance over the whole tensor, in float32.

    Quartiles are those at the ranks floor(q (n - 1)).
    """
    import numpy as np

    found = Importance()
    if not numel:
        return found
    negative, seen = survey(look(found.of), numel, lambda values: int(values.lt_(0).sum()))
    ranks = [int(share * (numel - 1)) for share in QUARTILES]
    below = [rank < negative for rank in ranks]
    keep = {at: rank + 1 if below[at] else numel - rank for at, rank in enumerate(ranks)}
    parts = dict(zip(below, _parts(seen, below), strict=True))
    bits = {one: sample(part, 1, 1) for one, part in parts.items()}
    samples = {at: bits[one] for at, one in enumerate(below)}
    del seen, parts, bits
    edges = largest(_of_importance(look, found, below), numel, keep, samples)
    values = (-edges[at].value if below[at] else edges[at].value for at in range(len(ranks)))
    first, middle, third = map(np.float32, values)
    found.threshold = float(middle + np.float32(1.5) * (third - first))
    return found


def _of_importance(look: Look, found: Importance, below: list[bool]) -> Any:
    """Looks at the importance once for each rank: its negative part where the rank lies below zero, else the other."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda models, block: see(_parts(found.of(models, block), below), block), sample)

    return looking


def _parts(importance: Tensor, below: list[bool]) -> list[Tensor]:
    """Overwrites the importance."""
    negative = importance.neg().clamp_(min=0) if any(below) else importance
    positive = importance.clamp_(min=0)
    return [negative if one else positive for one in below]


@method("arcee_fusion", live=3, inputs=(2, 2), base_is_input=True, facts=threshold, facts_nbytes=2 * SEARCH_NBYTES)
def arcee_fusion(models: list[Tensor], facts: Importance, block: Block) -> Tensor:
    """base + (other - base) where the importance reaches the threshold, else base."""
    base, other = models
    if bindings.is_supported(base, other):
        shift = facts.shift(models, block)
        bindings.kernels().important(base, other, shift, len(shift), base.numel() // len(shift), facts.threshold)
        return other
    mask = facts.of(models, block).ge_(facts.threshold)
    return other.sub_(base).mul_(mask).add_(base)
