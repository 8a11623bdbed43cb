"""arcee_fusion: take over only the changes that matter most, by size and by how they shift a row's distribution.

Arcee AI's method, as mergekit defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mergeforge.methods import Block, Look, method
from mergeforge.methods.magnitude import SEARCH_NBYTES, largest

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
SOFTENING = 1e-8


def importance(models: list[Tensor], block: Block) -> Tensor:
    """|other - base| times the KL divergence of the rows' softmax (other from base).

    Rounding makes some divergences of near rows negative. A vector is one row (one longer than a
    block is several).
    """
    shifts = _divergence(*(model.view(1, -1) if block.is_vector else model for model in models))
    base, other = models
    return (other - base).abs_().mul_(shifts)


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    import torch

    p, q = (one.softmax(dim=-1).add_(SOFTENING) for one in (other, base))
    return p.mul_(torch.div(p, q, out=q).log_()).sum(dim=-1, keepdim=True)


def threshold(look: Look, numel: int) -> float:
    """median + 1.5 (third - first quartile) of the importance over the whole tensor, in float32.

    Quartiles are those at the ranks floor(q (n - 1)).
    """
    import numpy as np

    if not numel:
        return 0.0
    negative = sum(look(lambda models, block: int(importance(models, block).lt_(0).sum())))
    ranks = [int(share * (numel - 1)) for share in QUARTILES]
    below = [rank < negative for rank in ranks]
    keep = {at: rank + 1 if below[at] else numel - rank for at, rank in enumerate(ranks)}
    found = largest(_of_importance(look, below), numel, keep)
    values = (-found[at].value if below[at] else found[at].value for at in range(len(ranks)))
    first, middle, third = map(np.float32, values)
    return float(middle + np.float32(1.5) * (third - first))


def _of_importance(look: Look, below: list[bool]) -> Any:
    """Looks at the importance once for each rank: its negative part where the rank lies below zero, else the other."""

    def parts(models: list[Tensor], block: Block) -> list[Tensor]:
        found = importance(models, block)
        negative = found.neg().clamp_(min=0) if any(below) else found
        positive = found.clamp_(min=0)
        return [negative if one else positive for one in below]

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda models, block: see(parts(models, block), block), sample)

    return looking


@method("arcee_fusion", live=3, inputs=(2, 2), base_is_input=True, facts=threshold, facts_nbytes=2 * SEARCH_NBYTES)
def arcee_fusion(models: list[Tensor], facts: float, block: Block) -> Tensor:
    """base + (other - base) where the importance reaches the threshold, else base."""
    base, other = models
    mask = importance(models, block).ge_(facts)
    return other.sub_(base).mul_(mask).add_(base)
