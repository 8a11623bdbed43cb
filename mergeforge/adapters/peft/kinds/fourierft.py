"""FourierFT: a few coefficients of the delta's spectrum (Gao et al., https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

from collections.abc import Mapping
from math import tau
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "n_frequency scaling random_loc_seed fan_in_fan_out bias n_frequency_pattern ifft2_norm alpha"


@adapter("FOURIERFT", prefixes=("fourierft_",), fields=_FIELDS)
def fourierft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + scaling * real(ifft2(S)), where S is zero except for n coefficients at random places.

    The places follow from random_loc_seed (peft/tuners/fourierft/layer.py). The delta is a sum of n cosines, that
    is, a product of rank 2n, so no spectrum of W's size is kept in memory.
    """
    (count,) = module.require("fourierft_spectrum", None)
    if config.get("ifft2_norm") not in (None, "backward"):
        raise ValueError(f"ifft2_norm: {config['ifft2_norm']} is not supported")
    rows, columns = module.out_features, module.in_features
    scale = float(config["scaling"]) / (rows * columns)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        spectrum = factors["fourierft_spectrum"].double()
        generator = torch.Generator().manual_seed(int(config.get("random_loc_seed") or 777))
        places = torch.randperm(rows * columns, generator=generator)[:count].to(spectrum.device)
        spectrum_rows, spectrum_columns = places // columns, places % columns
        angles = tau * (spectrum_columns.unsqueeze(1) * torch.arange(columns, device=places.device) % columns) / columns
        right = torch.cat([angles.cos(), angles.sin()]).to(factors["fourierft_spectrum"])

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            index = torch.arange(start, stop, device=places.device).unsqueeze(1)
            phases = tau * (index * spectrum_rows % rows) / rows
            left = torch.cat([phases.cos() * spectrum, phases.sin() * -spectrum], dim=1) * scale
            return left.to(right) @ right

        return delta

    nbytes = 8 * rows * columns + 8 * 6 * count * columns
    return {
        "weight": Formula(
            "FourierFT", prepare, scratch_nbytes=nbytes, scratch_blocks=2 + -(-12 * count // max(columns, 1))
        )
    }
