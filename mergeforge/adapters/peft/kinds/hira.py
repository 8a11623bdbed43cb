"""HiRA: the elementwise product of the weight and a low-rank matrix (Huang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r hira_dropout fan_in_fan_out bias rank_pattern runtime_config init_hira_weights"


@adapter("HIRA", prefixes=("hira_",), fields=_FIELDS)
def hira(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + W * (B A), without a scale (peft/tuners/hira/layer.py).

    For a convolution, A is (r, in, *kernel) and B is (out, r, 1, ...).
    """
    flat = (1,) * (len(module.weight) - 2)
    rank = module.require("hira_A", None, *module.weight[1:])[0]
    module.require("hira_B", module.out_features, rank, *flat)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        left, right = factors["hira_B"].flatten(1), factors["hira_A"].flatten(1)
        return lambda start, stop, base: (left[start:stop] @ right).mul_(base)

    return {"weight": Formula("HiRA", prepare, needs_base=True, scratch_blocks=1)}
