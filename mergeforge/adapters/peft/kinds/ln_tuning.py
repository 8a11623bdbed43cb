"""LN-tuning: norms trained as they are (Zhao et al., https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, Prepare, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("LN_TUNING", prefixes=("ln_tuning_",), fields="")
def ln_tuning(config: Config, module: Module) -> dict[str, Formula]:
    """The norm's weight and bias take the place of the base's (peft/tuners/ln_tuning/layer.py)."""
    return {
        leaf: Formula("LN-tuning", _replacing(role), needs_base=True, live=1)
        for leaf, role in (("weight", "ln_tuning_layers"), ("bias", "ln_tuning_layers.bias"))
        if role in module.shapes and module.require(role, module.outside)
    }


def _replacing(role: str) -> Prepare:
    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        value = factors[role].unsqueeze(1)
        return lambda start, stop, base: value[start:stop] - base

    return prepare
