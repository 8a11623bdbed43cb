"""HRA: a chain of Householder reflections (Yuan et al., https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("HRA", prefixes=("hra_",), fields="r apply_GS bias")
def hra(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W prod_i (I - 2 u_i u_i^T) with unit vectors u_i; with apply_GS, W - 2 (W Q) Q^T with orthogonalized ones.

    peft/tuners/hra/layer.py, get_delta_weight.
    """
    module.require("hra_u", module.in_features, None)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        units = factors["hra_u"]
        vectors = units.double()
        units = (torch.linalg.qr(vectors)[0] if config.get("apply_GS") else vectors / vectors.norm(dim=0)).to(units)

        def orthogonal(start: int, stop: int, base: Tensor) -> Tensor:
            change: Tensor = (base @ units) @ units.t()
            return change.mul_(-2)

        def chained(start: int, stop: int, base: Tensor) -> Tensor:
            result = base.clone()
            for unit in units.t():
                result.addr_(result @ unit, unit, alpha=-2)
            return result.sub_(base)

        return orthogonal if config.get("apply_GS") else chained

    return {
        "weight": Formula(
            "HRA",
            prepare,
            needs_base=True,
            scratch_nbytes=24 * module.in_features * module.shapes["hra_u"][1],
            scratch_blocks=3,
        )
    }
