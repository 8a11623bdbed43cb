"""HRA: a chain of Householder reflections (Yuan et al., https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("HRA", prefixes=("hra_",), fields="r apply_GS bias")
def hra(config: Config, module: Module) -> dict[str, Formula]:
    """W prod_i (I - 2 u_i u_i^T), with unit vectors u_i; apply_GS: W - 2 (W Q) Q^T with orthogonal ones.

    peft/tuners/hra/layer.py, get_delta_weight.
    """
    module.require("hra_u", module.inside, None)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        units = factors["hra_u"]
        wide = units.double()
        units = (torch.linalg.qr(wide)[0] if config.get("apply_GS") else wide / wide.norm(dim=0)).to(units)

        def together(start: int, stop: int, base: Tensor) -> Tensor:
            change: Tensor = (base @ units) @ units.t()
            return change.mul_(-2)

        def one_by_one(start: int, stop: int, base: Tensor) -> Tensor:
            result = base.clone()
            for unit in units.t():
                result.addr_(result @ unit, unit, alpha=-2)
            return result.sub_(base)

        return together if config.get("apply_GS") else one_by_one

    return {
        "weight": Formula("HRA", prepare, needs_base=True, fixed=24 * module.inside * module.shapes["hra_u"][1], live=3)
    }
