"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from mergeforge.methods import Reduction, Statistics, reduction


@reduction("passthrough", scratch_blocks=0, inputs=(1, 1))
def passthrough(tensor: Statistics, *, scale: list[float] | None = None) -> Reduction:
    """One model unchanged, or multiplied by `scale`."""
    return Reduction([1.0 if scale is None or scale[0] is None else scale[0]])
