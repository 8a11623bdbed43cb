"""WaveFT: a few wavelet coefficients of the change, or a few of its entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter
from mergeforge.adapters.peft.random_places import random_places

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "n_frequency scaling wavelet_family use_idwt random_loc_seed fan_in_fan_out bias n_frequency_pattern"


@adapter("WAVEFT", prefixes=("waveft_",), fields=f"{_FIELDS} proportional_parameters")
def waveft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + s * idwt2(S), where S is zero except for n coefficients at random places; without use_idwt, W + s * S.

    Each coefficient adds the product of two short filters, at a place that follows from random_loc_seed
    (peft/tuners/waveft/layer.py, get_delta_weight).
    """
    (count,) = module.require("waveft_spectrum", None)
    shape = (module.out_features, module.in_features)
    family, transformed = str(config.get("wavelet_family", "db1")), config.get("use_idwt", True)
    if transformed and family not in _filters():
        raise ValueError(f"its config sets wavelet_family: {family}, which PEFT cannot reconstruct either")
    low = _filters()[family] if transformed else [1.0]
    seed, scale = int(config.get("random_loc_seed", 777)), float(config.get("scaling", 25.0))

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        places = random_places(seed, shape[0] * shape[1], count)
        rows, columns, row_taps, column_taps = _placed_filters(places, shape, low)
        spectrum = factors["waveft_spectrum"]
        order = rows.argsort()
        weighted = row_taps[order].to(spectrum) * (spectrum[order.to(spectrum.device)] * scale).unsqueeze(1)
        return _scattered(
            rows[order], columns[order].to(spectrum.device), weighted, column_taps[order].to(spectrum), shape
        )

    nbytes = count * (64 + 40 * len(low))
    blocks = 2 + -(-32 * count * len(low) // (4 * max(shape[1], 1)))
    return {
        "weight": Formula("WaveFT", prepare, scratch_nbytes=nbytes, scratch_blocks=blocks, details={"scale": scale})
    }


@cache
def _filters() -> dict[str, list[float]]:
    """Wavelet -> its low-pass filter for reconstruction (tools/wavelet_filters)."""
    text = Path(__file__).parent.with_name("wavelet_filters.json").read_text(encoding="utf-8")
    filters: dict[str, list[float]] = json.loads(text)
    return filters


def _placed_filters(places: Tensor, shape: tuple[int, int], low: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each coefficient: the first row and column that it changes, and its filters (n, length) along both.

    PEFT takes the filter of the rows from the coefficient's column, and that of the columns from its row.
    """
    import torch

    if len(low) == 1:
        ones = torch.ones(len(places), 1, dtype=torch.float64)
        return places // shape[1], places % shape[1], ones, ones
    rows, is_high_row = _first_index(places // shape[1], shape[0], len(low))
    columns, is_high_column = _first_index(places % shape[1], shape[1], len(low))
    high = [(-1) ** tap * low[len(low) - 1 - tap] for tap in range(len(low))]
    bands = torch.tensor([low, high], dtype=torch.float64)
    return rows, columns, bands[is_high_column.long()], bands[is_high_row.long()]


def _first_index(places: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """For coefficients at `places` of an axis: the first index that each changes, and whether it is high-pass.

    The axis is padded by (filter length - 2), to an even number, with the size in its center; the first half are
    low-pass coefficients, the second half high-pass ones. The reconstruction is cropped to its center.
    """
    padded = size + length - 2
    padded += padded % 2
    half, at = padded // 2, places + (padded - size) // 2
    cropped = (padded - length + 2 - size) // 2
    return 2 * (at % half) - (length - 2) - cropped, at >= half


def _scattered(rows: Tensor, columns: Tensor, row_taps: Tensor, column_taps: Tensor, shape: tuple[int, int]) -> Delta:
    """The sum of the products of filters; `rows`, ascending, and `columns`: the first index that each changes."""
    import torch

    length = row_taps.shape[1]

    def delta(start: int, stop: int, base: Tensor) -> Tensor:
        edges = torch.tensor([start - length + 1, stop])
        first, last = torch.searchsorted(rows, edges).tolist()
        inside = slice(first, last)
        change = row_taps.new_zeros(stop - start, shape[1])
        taps = torch.arange(length, device=row_taps.device)
        row = rows[inside].to(row_taps.device).unsqueeze(1) + taps - start
        for tap in range(length):
            column = (columns[inside] + tap).unsqueeze(1).expand_as(row)
            valid = (row >= 0) & (row < stop - start) & (column >= 0) & (column < shape[1])
            values = row_taps[inside] * column_taps[inside, tap : tap + 1]
            change.view(-1).index_add_(0, (row * shape[1] + column)[valid], values[valid])
        return change

    return delta
