"""RandLoRA: a full-rank sum of scaled random bases (Albert et al., https://arxiv.org/abs/2502.00987)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r randlora_alpha projection_prng_key save_projection sparse very_sparse randlora_dropout fan_in_fan_out bias"


@adapter("RANDLORA", prefixes=("randlora_",), fields=_FIELDS)
def randlora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + alpha / r * B' A' with A' = A * lambda * gamma (r x bases rows), or its transpose if in > out.

    A (r, 1, min) and B (max, bases, r) are shared by all modules (peft/tuners/randlora/layer.py, get_scaled_bases).
    r * bases is the full rank, so a weight of 4096 x 4096 takes 137 GFLOP, 256 times as many as a LoRA of rank 16; none
    of it can be shared, because lambda and gamma, which differ between modules, stand inside the sum.
    """
    if "randlora_A" not in module.shapes:
        raise ValueError("its file does not contain the random bases; save it with save_projection=True")
    rank, bases = module.require("randlora_lambda", None, None)
    smaller, larger = sorted((module.out_features, module.in_features))
    module.require("randlora_gamma", bases, smaller)
    scale = float(config.get("randlora_alpha", 640)) / rank

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        a, b = factors["randlora_A"][:, :, :smaller], factors["randlora_B"][:larger, :bases].flatten(1)
        scaled = (a * factors["randlora_lambda"][:, :, None] * factors["randlora_gamma"] * scale).flatten(0, 1)
        return low_rank(b, scaled) if module.in_features <= module.out_features else low_rank(scaled.t(), b.t())

    nbytes = 12 * rank * bases * (smaller + larger)
    return {"weight": Formula("RandLoRA", prepare, scratch_nbytes=nbytes, details={"scale": scale})}
