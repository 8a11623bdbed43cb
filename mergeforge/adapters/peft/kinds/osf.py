"""OSF: trains the smallest singular directions of the weight anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter, low_rank
from mergeforge.core.bottom_triplets import bottom_triplets, bottom_triplets_nbytes

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


@adapter("OSF", prefixes=("osf_",), fields="effective_rank rank_pattern target_svd_config", may_be_empty=True)
def osf(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W - (its smallest singular triplets) + U diag(S) V (peft/tuners/osf/layer.py, get_delta_weight).

    There are as many triplets as S has numbers; they are eigenvectors of the smaller Gram matrix, in float64. A module
    whose effective_rank is that of its weight or larger has none, and is not changed.
    """
    u, s, v = _PARTS
    (rank,) = module.require(s, None)
    module.require(u, module.out_features, rank)
    module.require(v, rank, module.in_features)
    if rank == 0:
        return {}
    shape = (module.out_features, module.in_features)

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        left, right = bottom_triplets(weight, shape, rank)
        return {"initial left": left.to(factors[u]), "initial right": right.to(factors[u])}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        trained = low_rank(factors[u] * factors[s], factors[v])
        initial = low_rank(factors["initial left"], factors["initial right"])
        return lambda start, stop, base: trained(start, stop, base).sub_(initial(start, stop, base))

    nbytes = 12 * rank * sum(shape) + bottom_triplets_nbytes(shape, rank)
    return {"weight": Formula("OSF", prepare, scratch_nbytes=nbytes, scratch_blocks=3, statistic=statistic)}
