"""SHiRA: a few trained entries of the weight (Bhardwaj et al., https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("SHIRA", prefixes=("shira_",), fields="r mask_type random_seed fan_in_fan_out init_weights")
def shira(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W[i, j] + w for every stored (i, j) (peft/tuners/shira/layer.py, get_delta_weight)."""
    (count,) = module.require("shira_weight", None)
    module.require("shira_indices", 2, count)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        values, (rows, columns) = factors["shira_weight"], factors["shira_indices"].long()
        order = rows.argsort(stable=True)
        rows, columns, values = rows[order], columns[order], values[order]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            first, last = (int((rows < edge).sum()) for edge in (start, stop))
            change = values.new_zeros(stop - start, module.in_features)
            change.index_put_((rows[first:last] - start, columns[first:last]), values[first:last], accumulate=True)
            return change

        return delta

    return {"weight": Formula("SHiRA", prepare, scratch_nbytes=48 * count)}
