"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor


def as_sum(*, scale: list[float] | None) -> WeightedSum:
    return WeightedSum([1.0 if scale is None or scale[0] is None else scale[0]])


@method("passthrough", scratch_blocks=0, inputs=(1, 1), as_sum=as_sum)
def passthrough(models: list[Tensor], *, scale: list[float] | None = None) -> Tensor:
    """One model unchanged, or multiplied by `scale`."""
    return as_sum(scale=scale).evaluate(models)
