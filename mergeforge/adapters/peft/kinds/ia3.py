"""IA3: activations rescaled by a learned vector (Liu et al., https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("IA3", prefixes=("ia3_",), fields="feedforward_modules fan_in_fan_out init_ia3_weights")
def ia3(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W * l: by rows (and the bias), or by columns for a feed-forward module.

    l is (out, 1) or (1, in); for a convolution (1, channels, 1, 1) (peft/tuners/ia3/layer.py).
    """
    shape = module.require("ia3_l")
    size, channels = prod(shape), module.weight[1] if len(module.weight) > 1 else 1
    by_rows = size == module.out_features and (shape[0] == size or (size != channels and len(shape) > 2))
    if not by_rows and size not in (channels, module.in_features):
        raise ValueError(f"{module.path}: ia3_l has {size} values, but its weight is {list(module.weight)}")

    def rows(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["ia3_l"].flatten().sub(1).unsqueeze(1)
        return lambda start, stop, base: base * change[start:stop]

    def columns(factors: Mapping[str, Tensor]) -> Delta:
        change = factors["ia3_l"].flatten().sub(1)
        change = change.repeat_interleave(module.in_features // len(change))
        return lambda start, stop, base: base * change

    formulas = {"weight": Formula("IA3", rows if by_rows else columns, needs_base=True, scratch_blocks=1)}
    if by_rows:
        formulas["bias"] = Formula("IA3", rows, needs_base=True, scratch_blocks=1)
    return formulas
