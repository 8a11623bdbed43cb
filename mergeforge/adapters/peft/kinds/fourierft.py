"""FourierFT: a few coefficients of the delta's spectrum (Gao et al., https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

from collections.abc import Mapping
from math import tau
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter
from mergeforge.adapters.peft.random_places import random_places

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "n_frequency scaling random_loc_seed fan_in_fan_out bias n_frequency_pattern ifft2_norm alpha"


@adapter("FOURIERFT", prefixes=("fourierft_",), fields=_FIELDS)
def fourierft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + scaling * real(ifft2(S)), where S is zero except for n coefficients at random places.

    The places follow from random_loc_seed (peft/tuners/fourierft/layer.py). The transform over the rows of S is a sum
    over the coefficients, and the one over its columns an FFT per row, so no spectrum of W's size is kept in memory.
    """
    (count,) = module.require("fourierft_spectrum", None)
    if config.get("ifft2_norm") not in (None, "backward"):
        raise ValueError(f"ifft2_norm: {config['ifft2_norm']} is not supported")
    rows, columns = module.out_features, module.in_features
    scale = float(config["scaling"]) / (rows * columns)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        spectrum = factors["fourierft_spectrum"]
        places = random_places(int(config.get("random_loc_seed") or 777), rows * columns, count).to(spectrum.device)
        spectrum_rows, spectrum_columns = places // columns, places % columns
        mirrored = spectrum_columns > columns // 2  # real(c e^it) = real(c e^-it): into the half that irfft reads
        frequency = torch.where(mirrored, columns - spectrum_columns, spectrum_columns)
        steps = torch.where(mirrored, -spectrum_rows, spectrum_rows) % rows
        is_single = (frequency == 0) | (2 * frequency == columns)  # irfft counts the other frequencies twice
        weights = torch.where(is_single, spectrum, spectrum / 2) * scale
        angles = torch.arange(rows, dtype=torch.float64) * (tau / rows)
        circle = torch.complex(angles.cos(), angles.sin()).to(torch.complex64).to(spectrum.device)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            index = torch.arange(start, stop, device=places.device).unsqueeze(1)
            half = torch.zeros(stop - start, columns // 2 + 1, dtype=torch.complex64, device=places.device)
            half.index_add_(1, frequency, circle[index * steps % rows] * weights)
            change: Tensor = torch.fft.irfft(half, n=columns, norm="forward")
            return change.to(spectrum)

        return delta

    nbytes = 40 * count + 24 * rows
    blocks = 4 + -(-24 * count // (4 * max(columns, 1)))
    return {"weight": Formula("FourierFT", prepare, scratch_nbytes=nbytes, scratch_blocks=blocks)}
