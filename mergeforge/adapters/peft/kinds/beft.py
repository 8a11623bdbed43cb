"""BEFT: trained vectors that are added to the biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("BEFT", prefixes=("beft_",), fields="init_weights")
def beft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """b + beft_bias (peft/tuners/beft/layer.py)."""
    module.require("beft_bias", 1, module.out_features)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["beft_bias"].t()
        return lambda start, stop, base: change[start:stop].clone()

    return {"bias": Formula("BEFT", prepare, scratch_blocks=1)}
