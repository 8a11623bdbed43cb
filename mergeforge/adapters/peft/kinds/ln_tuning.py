"""LN-tuning: fully trained norms (Zhao et al., https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, Prepare, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("LN_TUNING", prefixes=("ln_tuning_",), fields="")
def ln_tuning(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """The norm's weight and bias replace the base's (peft/tuners/ln_tuning/layer.py)."""
    return {
        leaf: Formula("LN-tuning", _replace(role), needs_base=True, scratch_blocks=1)
        for leaf, role in (("weight", "ln_tuning_layers"), ("bias", "ln_tuning_layers.bias"))
        if role in module.shapes and module.require(role, module.out_features)
    }


def _replace(role: str) -> Prepare:
    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        value = factors[role].unsqueeze(1)
        return lambda start, stop, base: value[start:stop] - base

    return prepare
