"""BEFT: biases that were trained as additions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("BEFT", prefixes=("beft_",), fields="init_weights")
def beft(config: Config, module: Module) -> dict[str, Formula]:
    """b + beft_bias (peft/tuners/beft/layer.py)."""
    module.require("beft_bias", 1, module.outside)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["beft_bias"].t()
        return lambda start, stop, base: change[start:stop].clone()

    return {"bias": Formula("BEFT", prepare, live=1)}
