"""AdaMSS: each cluster of the weight's rows has a small matrix between singular directions of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.k_means import k_means
from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter
from mergeforge.adapters.peft.seeded_svd import seeded_svd_lowrank
from mergeforge.core.bottom_triplets import read_dense
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r num_subspaces subspace_rank svd_threshold random_seed use_asa asa_target_subspaces init_warmup"
_FIELDS += " final_warmup mask_interval asa_importance_beta asa_uncertainty_beta asa_schedule_exponent use_dynamic_rank"
_SEED = 123456789  # of PEFT's k-means (peft/tuners/adamss/utils.py, clustering_Z)
_STEPS = 10
_SAME_DIRECTIONS = 0.999
_HINT = "merge it with PEFT, on the kind of device that it was trained on"


@adapter("ADAMSS", prefixes=("adamss_",), fields=_FIELDS)
def adamss(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B_i A_i V for the rows of cluster i (peft/tuners/adamss/layer.py, get_delta_weight). V is stored.

    The file does not say which rows a cluster has. As PEFT does, this computes them again, by k-means of the rows of U
    in U S V^T = [W, bias]; the sizes of the clusters must then be those of the file, and the directions its V.
    """
    rank, columns = module.require("adamss_newB", None, None)
    has_bias = columns == module.in_features + 1
    if not has_bias:
        module.require("adamss_newB", rank, module.in_features)
    count = sum(role.startswith("adamss_B.") for role in module.shapes)
    sizes = [module.require(f"adamss_B.{at}", None, None)[0] for at in range(count)]
    for at in range(count):
        module.require(f"adamss_A.{at}", module.shapes[f"adamss_B.{at}"][1], rank)
    shape = (module.out_features, module.in_features)

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        import torch

        matrix, v = read_dense(weight, shape).float().cpu(), factors["adamss_newB"].float().cpu()
        if has_bias:
            matrix = torch.cat([matrix, factors["base_bias"].float().cpu().unsqueeze(1)], dim=1)
        u = _left_directions(matrix, v, int(config.get("random_seed", 0)), module.path)
        clusters = torch.from_numpy(k_means(u.numpy(), count, _STEPS, _SEED))
        if torch.bincount(clusters, minlength=count).tolist() != sizes:
            text = f"{module.path}: the clusters of the weight's rows do not have the sizes of those in the AdaMSS file"
            raise SourceError(f"{text}; it was trained on other weights, or its clusters cannot be found", hint=_HINT)
        return {"clusters": clusters}

    def left(factors: Mapping[str, Tensor]) -> Tensor:
        v = factors["adamss_newB"]
        result = v.new_zeros(module.out_features, rank)
        clusters = factors["clusters"].to(v.device)
        for at in range(count):
            result[clusters == at] = factors[f"adamss_B.{at}"] @ factors[f"adamss_A.{at}"]
        return result

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        rows, v = left(factors), factors["adamss_newB"][:, : module.in_features]
        return lambda start, stop, base: rows[start:stop] @ v

    def prepare_bias(factors: Mapping[str, Tensor]) -> Delta:
        change = (left(factors) @ factors["adamss_newB"][:, module.in_features]).unsqueeze(1)
        return lambda start, stop, base: change[start:stop]

    nbytes = 12 * (shape[0] + 1) * (columns + 2 * rank) + 24 * rank * sum(shape)
    changed = {"weight": prepare, "bias": prepare_bias} if has_bias else {"weight": prepare}
    return {
        leaf: Formula("AdaMSS", delta, scratch_nbytes=nbytes, statistic=statistic, reads_bias=has_bias)
        for leaf, delta in changed.items()
    }


def _left_directions(matrix: Tensor, v: Tensor, seed: int, path: str) -> Tensor:
    """U of torch.svd_lowrank, up to a rotation, which no distance depends on.

    That of a matrix with fewer rows than columns follows from V. Any other depends on random numbers, and those of a
    GPU differ from those of a CPU: then V differs too. Raises SourceError.
    """
    if matrix.shape[0] < matrix.shape[1]:
        product = matrix @ v.t()
        return product.div_(product.norm(dim=0).clamp_min_(1e-30))
    u, _, again = seeded_svd_lowrank(matrix, len(v), 2, seed)
    if float((v @ again).square().sum()) < _SAME_DIRECTIONS * len(v):
        text = f"{path}: the random singular directions of the AdaMSS file cannot be drawn again from the weight"
        raise SourceError(f"{text}; it was trained on a GPU, or on other weights", hint=_HINT)
    return u
