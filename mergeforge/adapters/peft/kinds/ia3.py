"""IA3: activations rescaled by a learnt vector (Liu et al., https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("IA3", prefixes=("ia3_",), fields="feedforward_modules fan_in_fan_out init_ia3_weights")
def ia3(config: Config, module: Module) -> dict[str, Formula]:
    """W * l: by rows (and the bias with it), or by columns where the module is a feed-forward one.

    l is (out, 1) or (1, in); in convolutions (1, channels, 1, 1) (peft/tuners/ia3/layer.py).
    """
    shape = module.require("ia3_l")
    size, channels = prod(shape), module.weight[1] if len(module.weight) > 1 else 1
    by_rows = size == module.outside and (shape[0] == size or (size != channels and len(shape) > 2))
    if not by_rows and size not in (channels, module.inside):
        raise ValueError(f"{module.path}: ia3_l has {size} numbers, its weight is {list(module.weight)}")

    def rows(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["ia3_l"].flatten().sub(1).unsqueeze(1)
        return lambda start, stop, base: base * change[start:stop]

    def columns(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["ia3_l"].flatten().sub(1)
        change = change.repeat_interleave(module.inside // len(change))
        return lambda start, stop, base: base * change

    formulas = {"weight": Formula("IA3", rows if by_rows else columns, needs_base=True, live=1)}
    if by_rows:
        formulas["bias"] = Formula("IA3", rows, needs_base=True, live=1)
    return formulas
