"""RandLoRA: a full-rank sum of scaled random bases (Albert et al., https://arxiv.org/abs/2502.00987)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r randlora_alpha projection_prng_key save_projection sparse very_sparse randlora_dropout fan_in_fan_out bias"


@adapter("RANDLORA", prefixes=("randlora_",), fields=_FIELDS)
def randlora(config: Config, module: Module) -> dict[str, Formula]:
    """W + alpha / r * B' A' with A' = A * lambda * gamma (r x bases rows), or its transpose where in > out.

    A (r, 1, min) and B (max, bases, r) are shared by all modules (peft/tuners/randlora/layer.py, get_scaled_bases).
    """
    if "randlora_A" not in module.shapes:
        raise ValueError("it does not hold its random bases: save it with save_projection=True")
    rank, bases = module.require("randlora_lambda", None, None)
    least, most = sorted((module.outside, module.inside))
    module.require("randlora_gamma", bases, least)
    scale = float(config.get("randlora_alpha", 640)) / rank

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        a, b = factors["randlora_A"][:, :, :least], factors["randlora_B"][:most, :bases].flatten(1)
        mixed = (a * factors["randlora_lambda"][:, :, None] * factors["randlora_gamma"] * scale).flatten(0, 1)
        return low_rank(b, mixed) if module.inside <= module.outside else low_rank(mixed.t(), b.t())

    held = 12 * rank * bases * (least + most)
    return {"weight": Formula("RandLoRA", prepare, fixed=held, facts={"scale": scale})}
