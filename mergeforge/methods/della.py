"""della and della_linear: drop elements at random, the larger ones less often, and rescale the rest.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, UNIT, Block, Look, method
from mergeforge.methods._mask_cache import KEPT, MASKS_NBYTES, Masks
from mergeforge.methods._random_mask import drawing, random_mask
from mergeforge.methods._rescale import Rescaled, ratios
from mergeforge.methods._sub_blocks import by_rows
from mergeforge.methods._weighted_sum import agreeing_sum, weighted_sum
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

LEAST_BUCKETS, MOST_BUCKETS = 64, 1 << 16  # that magnitudes of a row are put into


def kept(
    deltas: list[Tensor], block: Block, density: list[float], epsilon: list[float], masks: list[Masks]
) -> list[Tensor]:
    """Each delta's block, in place, with elements kept with a probability that grows with their rank in the row."""
    for at, (delta, share, width, mask) in enumerate(zip(deltas, density, epsilon, masks, strict=True)):
        if share < 1:
            mask.apply([delta], block, partial(_mask, delta, block, at, share, width))
    return deltas


def _mask(delta: Tensor, block: Block, index: int, density: float, epsilon: float) -> Tensor:
    found = _mask_in_c(delta, block, index, density, epsilon) if bindings.is_supported(delta) else None
    return random_mask(delta, block, index, _probability(delta, block, density, epsilon)) if found is None else found


def _mask_in_c(delta: Tensor, block: Block, index: int, density: float, epsilon: float) -> Tensor | None:
    """The same mask with hardly a sort; None where too many magnitudes of a row are nearly, but not quite, equal."""
    import numpy as np
    import torch

    rows, columns = (1, delta.numel()) if block.is_vector else delta.shape
    drawn = drawing(block, index, density)
    buckets, room = min(max(columns // 2, LEAST_BUCKETS), MOST_BUCKETS), max(columns // 8, LEAST_BUCKETS)
    by = bindings.RankMaskArgs(
        element=block.start & 0x7FFFFFFF,
        mask=(*drawn.upper, *drawn.lower, drawn.limit),
        lowest=density - epsilon if columns > 1 else density,
        step=2 * epsilon / (columns - 1) if columns > 1 else 0.0,
        buckets=buckets,
        room=room,
    )
    of_bucket, of_number = np.empty((3, buckets), np.uint32), np.empty((2, columns), np.uint16)
    by.keep_alive(
        members=np.empty(buckets, np.uint64),
        ranks=of_bucket[0],
        sure=of_bucket[1],
        possible=of_bucket[2],
        bucket=of_number[0],
        draws=of_number[1],
        before=np.empty(columns, np.uint32),
        sorted=np.empty(room, np.uint64),
    )
    kept = torch.empty(delta.shape, dtype=torch.bool)
    return None if bindings.kernels().ranked_mask(delta, by, rows, columns, kept) else kept


def _probability(delta: Tensor, block: Block, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for a row's smallest element to density + epsilon for its largest."""
    import torch

    rows = delta.view(1, -1) if block.is_vector else delta
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(delta, density, dtype=torch.float32)
    result = torch.empty(rows.shape, device=delta.device)
    for part, place in by_rows([rows, result]):
        order = _order(part)
        steps = torch.arange(columns, dtype=torch.float32, device=delta.device).mul_(2 * epsilon / (columns - 1))
        place.scatter_(1, order, steps.add_(density - epsilon).expand(part.shape))
    return result.view(delta.shape)


def _order(rows: Tensor) -> Tensor:
    """Each row's columns by rising magnitude (in float32), equal ones in their order.

    On a CPU numpy sorts the magnitudes' bits with their columns behind them as one integer, which it does 15
    times as fast as torch sorts floats.
    """
    import torch

    if rows.device.type != "cpu":
        return rows.float().abs().sort(dim=1, stable=True).indices
    keys = torch.empty((*rows.shape, 2), dtype=torch.int32)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    keys[..., low] = torch.arange(rows.shape[1], dtype=torch.int32)
    torch.abs(rows.float(), out=keys[..., high].view(torch.float32))
    order = keys.view(torch.int64).squeeze(-1)
    order.numpy().sort(axis=1)
    return order.bitwise_and_((1 << 32) - 1)


def check(*, density: list[float], epsilon: list[float], **_: object) -> None:
    for share, width in zip(density, epsilon, strict=True):
        if share < 1 and not (share - width > 0 and share + width < 1):
            raise ValueError(f"density {share:g} -+ epsilon {width:g} leaves (0, 1): give a smaller epsilon")


def facts(
    look: Look, numel: int, *, density: list[float], epsilon: list[float], rescale: bool, **_: object
) -> Rescaled[list[Masks]]:
    """The masks, and the ratio that restores each task vector's mass."""
    count = len(density)
    if not rescale or all(one >= 1 for one in density):
        return Rescaled([Masks() for _ in density], [1.0] * count)
    masks = [Masks(KEPT) for _ in density]
    return Rescaled(masks, ratios(look, lambda deltas, block: kept(deltas, block, density, epsilon, masks), count))


WITHIN = {"density": DENSITY, "epsilon": UNIT}


@method("della_linear", live=4, facts=facts, facts_nbytes=MASKS_NBYTES, check=check, within=WITHIN)
def della_linear(
    deltas: list[Tensor],
    facts: Rescaled[list[Masks]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    epsilon: list[float] = 0.15,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Drop by magnitude ranks within rows, restore the mass, add up with weights. int8_mask has no effect."""
    left = kept(deltas, block, density, epsilon, facts.found)
    return weighted_sum(left, weight, normalize, lambda_, facts.ratios)


@method("della", live=4, facts=facts, facts_nbytes=MASKS_NBYTES, check=check, within=WITHIN)
def della(
    deltas: list[Tensor],
    facts: Rescaled[list[Masks]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    epsilon: list[float] = 0.15,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """della_linear, and only elements that have the elected sign (TIES' election). int8_mask has no effect."""
    left = kept(deltas, block, density, epsilon, facts.found)
    return agreeing_sum(left, weight, normalize, lambda_, facts.ratios)
