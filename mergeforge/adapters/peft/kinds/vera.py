"""VeRA: shared random projections, scaled by vectors (Kopiczko et al., https://arxiv.org/abs/2310.11454), and PVeRA."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r projection_prng_key save_projection fan_in_fan_out bias d_initial"


@adapter("VERA", prefixes=("vera_",), fields=f"{_FIELDS} vera_dropout")
def vera(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + (b * B) (d * A): B and A are the first rows and columns of matrices that all modules share.

    If the file does not contain them, they are generated again from projection_prng_key, in the size of the
    largest adapted module (peft/tuners/vera/model.py, _init_vera_A_vera_B).
    """
    return _shared_projections("VeRA", "vera", config, module, int(module.require("vera_lambda_d")[0]))


@adapter("PVERA", prefixes=("pvera_",), fields=f"{_FIELDS} pvera_dropout sample_at_inference")
def pvera(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """VeRA whose lambda_d and A have a variance in their second halves: the mean is merged."""
    return _shared_projections("PVeRA", "pvera", config, module, int(module.require("pvera_lambda_d")[0]) // 2)


def _shared_projections(
    label: str, prefix: str, config: Config, module: AdaptedModule, rank: int
) -> dict[str, Formula]:
    module.require(f"{prefix}_lambda_b", module.out_features)
    stored = f"{prefix}_A" in module.shapes
    if not stored and prefix == "pvera":
        raise ValueError("its file does not contain the shared projections; save it with save_projection=True")
    largest = module.largest

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        lambda_b, lambda_d = factors[f"{prefix}_lambda_b"], factors[f"{prefix}_lambda_d"][:rank]
        projections = (
            (factors[f"{prefix}_A"], factors[f"{prefix}_B"]) if stored else _random_projections(config, rank, largest)
        )
        a, b = (matrix.to(lambda_b) for matrix in projections)
        left = b[: module.out_features, :rank] * lambda_b.unsqueeze(1)
        return low_rank(left, a[:rank, : module.in_features] * lambda_d.unsqueeze(1))

    nbytes = 8 * rank * (module.out_features + module.in_features) + (0 if stored else 4 * rank * sum(largest))
    return {"weight": Formula(label, prepare, scratch_nbytes=nbytes)}


def _random_projections(config: Config, rank: int, largest: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), uniform as Kaiming's for a ReLU-like gain of sqrt(2)."""
    import torch

    generator = torch.Generator().manual_seed(int(config["projection_prng_key"]))

    def uniform(*shape: int) -> Tensor:
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return uniform(rank, largest[1]), uniform(largest[0], rank)
