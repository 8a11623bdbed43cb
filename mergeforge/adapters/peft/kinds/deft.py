"""DEFT: removes a subspace of the outputs and injects a low-rank matrix there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r decomposition_method init_scale alpha para fan_in_fan_out deft_dropout bias"


@adapter("DEFT", prefixes=("deft_",), fields=_FIELDS)
def deft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + Q (s R - K^T W), where K = Q = qr(P), or Q = P and K = relu(P) (peft/tuners/deft/layer.py).

    With `para` there is no R. K^T W is a statistic: one pass over W.
    """
    rank = module.require("deft_P", module.out_features, None)[1]
    if not config.get("para"):
        module.require("deft_R", rank, module.in_features)
    orthogonal = config.get("decomposition_method", "relu") == "qr"
    scale = float(config["alpha"]) / rank if config.get("alpha") else 1.0

    def directions(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        import torch

        if orthogonal:
            basis: Tensor = torch.linalg.qr(factors["deft_P"]).Q
            return basis, basis
        return factors["deft_P"], factors["deft_P"].relu()

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        right = directions(factors)[1]
        product = right.new_zeros(rank, module.in_features)
        for start, rows in weight():
            product.addmm_(right[start : start + len(rows)].t(), rows)
        return {"removed": product}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        removed = factors["removed"]
        change = -removed if config.get("para") else factors["deft_R"] * scale - removed
        return low_rank(directions(factors)[0], change)

    nbytes = 16 * rank * (module.out_features + module.in_features)
    return {"weight": Formula("DEFT", prepare, scratch_nbytes=nbytes, details={"scale": scale}, statistic=statistic)}
