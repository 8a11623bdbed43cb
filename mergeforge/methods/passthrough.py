"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method

if TYPE_CHECKING:
    from torch import Tensor


@method("passthrough", live=0, inputs=(1, 1))
def passthrough(models: list[Tensor], *, scale: list[float] | None = None) -> Tensor:
    """One model unchanged, or multiplied by `scale` where it is given."""
    return models[0] if scale is None or scale[0] is None else models[0].mul_(scale[0])
