"""Uni-LoRA: the entries of all factors are those of one vector, scaled (https://arxiv.org/abs/2506.00799)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r proj_seed theta_d_length unilora_dropout fan_in_fan_out bias init_theta_d_bound save_indices"


@adapter("UNILORA", prefixes=("unilora_",), fields=_FIELDS)
def unilora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B A with A = theta[indices] * scales, and B likewise (peft/tuners/unilora/layer.py).

    The file must hold the indices: PEFT deals them out in the order in which the class defines its modules.
    """
    rank = module.require("unilora_indices_A", None, module.in_features)[0]
    module.require("unilora_indices_B", module.out_features, rank)
    for side in "AB":
        module.require(f"unilora_scales_{side}", *module.shapes[f"unilora_indices_{side}"])
    module.require("unilora_theta_d", None)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        a, b = (
            factors["unilora_theta_d"][factors[f"unilora_indices_{side}"].long()] * factors[f"unilora_scales_{side}"]
            for side in "AB"
        )
        return low_rank(b, a)

    return {
        "weight": Formula("Uni-LoRA", prepare, scratch_nbytes=16 * rank * (module.out_features + module.in_features))
    }
