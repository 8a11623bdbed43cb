"""PSOFT: rotates the weight's largest singular directions among themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter, low_rank
from mergeforge.adapters.peft.seeded_svd import seeded_svd_lowrank
from mergeforge.core.bottom_triplets import read_dense

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r psoft_alpha psoft_dropout fan_in_fan_out ab_svd_init psoft_svd psoft_svd_lowrank_niter random_seed"
_FIELDS += " psoft_orth psoft_mag_b psoft_mag_a use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps"
_WARNING = (
    "PSOFT does not store the singular vectors that it rotates; they are computed again on the CPU, as PEFT does. "
    "Their signs may differ from those of a GPU: compare a few outputs with the unmerged model's"
)


@adapter("PSOFT", prefixes=("psoft_",), fields=_FIELDS)
def psoft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + s B (R - I) A, with A and B from the r largest singular triplets of W (peft/tuners/psoft/layer.py).

    R is orthogonal (Cayley's transform of a skew matrix) between two diagonal matrices. Signs of singular vectors
    matter, so the decomposition is the call that PEFT makes, of all of W in float32.
    """
    rank = int(config["r"])
    orthogonal = config.get("psoft_orth", True)
    module.require("psoft_R", *((rank * (rank - 1) // 2,) if orthogonal else (rank, rank)))
    scale = float(config.get("psoft_alpha", 32)) / rank
    shape = (module.out_features, module.in_features)

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        like = factors["psoft_R"]
        u, s, vh = _triplets(read_dense(weight, shape).float().cpu(), rank, config)
        if config.get("ab_svd_init", "psoft_init") == "psoft_init":
            return {"A": vh.to(like), "B": (u * (s / scale)).to(like)}
        root = (s / scale).sqrt()
        return {"A": (root.unsqueeze(1) * vh).to(like), "B": (u * root).to(like)}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        rotation = _rotation(factors, rank, config)
        rotation.diagonal().sub_(1)
        return low_rank(factors["B"] @ rotation * scale, factors["A"])

    small = min(shape)
    nbytes = 4 * (6 * shape[0] * shape[1] + 8 * small * small)
    details = {"scale": scale}
    return {
        "weight": Formula(
            "PSOFT", prepare, scratch_nbytes=nbytes, details=details, statistic=statistic, warning=_WARNING
        )
    }


def _triplets(matrix: Tensor, rank: int, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    if config.get("psoft_svd", "full") == "full":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    steps, seed = int(config.get("psoft_svd_lowrank_niter", 10)), int(config.get("random_seed", 0))
    u, s, v = seeded_svd_lowrank(matrix, rank, steps, seed)
    return u, s, v.t()


def _rotation(factors: Mapping[str, Tensor], rank: int, config: Config) -> Tensor:
    """R: diag(b) (I + Q) (I - Q)^-1 diag(a), or the first terms of its Neumann series."""
    import torch

    weight = factors["psoft_R"]
    if not config.get("psoft_orth", True):
        matrix = weight.clone()
    else:
        skew = weight.new_zeros(rank, rank)
        row, column = torch.triu_indices(rank, rank, 1)
        skew[row, column] = weight
        skew = skew - skew.t()
        matrix = _neumann(skew, config) if config.get("use_cayley_neumann") else _cayley(skew)
    if "psoft_R.vector_b" in factors:
        matrix = factors["psoft_R.vector_b"].unsqueeze(1) * matrix
    return matrix * factors["psoft_R.vector_a"] if "psoft_R.vector_a" in factors else matrix


def _cayley(skew: Tensor) -> Tensor:
    import torch

    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    result: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return result


def _neumann(skew: Tensor, config: Config) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(n - 1), with Q's norm bounded by cayley_neumann_eps."""
    import torch

    bound = config.get("cayley_neumann_eps")
    if bound is not None and (norm := skew.norm()) > bound:
        skew = skew * (bound / (norm + 1e-12))
    terms = int(config.get("num_cayley_neumann_terms", 5))
    result, power = torch.eye(len(skew), dtype=skew.dtype, device=skew.device), skew
    if terms > 1:
        result.add_(power, alpha=2)
    for at in range(2, terms):
        power = power @ skew
        result.add_(power, alpha=2 if at < max(terms - 1, 3) else 1)
    return result
