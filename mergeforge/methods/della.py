"""della and della_linear: drop elements at random, the larger ones less often, and rescale the rest.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, UNIT, Block, BlockScan, method
from mergeforge.methods._mask_cache import CACHED_ELEMENTS, MASK_CACHE_NBYTES, MaskCache
from mergeforge.methods._random_mask import mask_key, random_mask
from mergeforge.methods._rescale import Rescaled, ratios
from mergeforge.methods._sub_blocks import by_rows
from mergeforge.methods._weighted_sum import sign_consensus_sum, weighted_sum
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

MIN_BUCKETS, MAX_BUCKETS = 64, 1 << 16  # that the magnitudes of a row are sorted into


def apply_rank_masks(
    deltas: list[Tensor], block: Block, density: list[float], epsilon: list[float], masks: list[MaskCache]
) -> list[Tensor]:
    """Keep each element of the deltas' block with a probability that grows with its rank in the row, in place."""
    for index, (delta, mean, spread, mask) in enumerate(zip(deltas, density, epsilon, masks, strict=True)):
        if mean < 1:
            mask.apply([delta], block, partial(rank_mask, delta, block, index, mean, spread))
    return deltas


def rank_mask(delta: Tensor, block: Block, index: int, density: float, epsilon: float) -> Tensor:
    native_mask = rank_mask_native(delta, block, index, density, epsilon) if bindings.is_supported(delta) else None
    if native_mask is not None:
        return native_mask
    return random_mask(delta, block, index, drop_probability(delta, block, density, epsilon))


def rank_mask_native(delta: Tensor, block: Block, index: int, density: float, epsilon: float) -> Tensor | None:
    """The same mask with hardly any sorting; None where too many magnitudes of a row are nearly equal."""
    import numpy as np
    import torch

    rows, columns = (1, delta.numel()) if block.is_vector else delta.shape
    key = mask_key(block, index, density)
    buckets, capacity = min(max(columns // 2, MIN_BUCKETS), MAX_BUCKETS), max(columns // 8, MIN_BUCKETS)
    arguments = bindings.RankMaskArgs(
        element=block.start & 0x7FFFFFFF,
        mask=(*key.upper, *key.lower, key.limit),
        lowest=density - epsilon if columns > 1 else density,
        step=2 * epsilon / (columns - 1) if columns > 1 else 0.0,
        buckets=buckets,
        room=capacity,
    )
    per_bucket, per_column = np.empty((3, buckets), np.uint32), np.empty((2, columns), np.uint16)
    arguments.keep_alive(
        members=np.empty(buckets, np.uint64),
        ranks=per_bucket[0],
        sure=per_bucket[1],
        possible=per_bucket[2],
        bucket=per_column[0],
        draws=per_column[1],
        before=np.empty(columns, np.uint32),
        sorted=np.empty(capacity, np.uint64),
    )
    mask = torch.empty(delta.shape, dtype=torch.bool)
    return None if bindings.kernels().ranked_mask(delta, arguments, rows, columns, mask) else mask


def drop_probability(delta: Tensor, block: Block, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for a row's smallest element to density + epsilon for its largest."""
    import torch

    rows = delta.view(1, -1) if block.is_vector else delta
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(delta, density, dtype=torch.float32)
    result = torch.empty(rows.shape, device=delta.device)
    for part, out in by_rows([rows, result]):
        order = magnitude_order(part)
        steps = torch.arange(columns, dtype=torch.float32, device=delta.device).mul_(2 * epsilon / (columns - 1))
        out.scatter_(1, order, steps.add_(density - epsilon).expand(part.shape))
    return result.view(delta.shape)


def magnitude_order(rows: Tensor) -> Tensor:
    """Each row's columns by ascending magnitude (in float32), equal magnitudes by column.

    On a CPU numpy sorts integers that hold a magnitude's bits and, below them, its column, 15 times as fast as
    torch sorts floats.
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
    for mean, spread in zip(density, epsilon, strict=True):
        if mean < 1 and not (mean - spread > 0 and mean + spread < 1):
            raise ValueError(f"density {mean:g} +/- epsilon {spread:g} is not within (0, 1): use a smaller epsilon")


def collect_stats(
    scan: BlockScan, numel: int, *, density: list[float], epsilon: list[float], rescale: bool, **_: object
) -> Rescaled[list[MaskCache]]:
    """The masks, and the ratio that restores each task vector's L1 norm."""
    count = len(density)
    if not rescale or all(mean >= 1 for mean in density):
        return Rescaled([MaskCache() for _ in density], [1.0] * count)
    masks = [MaskCache(CACHED_ELEMENTS) for _ in density]

    def keep(deltas: list[Tensor], block: Block) -> list[Tensor]:
        return apply_rank_masks(deltas, block, density, epsilon, masks)

    return Rescaled(masks, ratios(scan, keep, count))


WITHIN = {"density": DENSITY, "epsilon": UNIT}


@method(
    "della_linear", scratch_blocks=4, stats=collect_stats, stats_nbytes=MASK_CACHE_NBYTES, check=check, within=WITHIN
)
def della_linear(
    deltas: list[Tensor],
    stats: Rescaled[list[MaskCache]],
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
    """Drop elements by magnitude rank within rows, restore the L1 norm, add up. int8_mask has no effect."""
    masked = apply_rank_masks(deltas, block, density, epsilon, stats.selection)
    return weighted_sum(masked, weight, normalize, lambda_, stats.ratios)


@method("della", scratch_blocks=4, stats=collect_stats, stats_nbytes=MASK_CACHE_NBYTES, check=check, within=WITHIN)
def della(
    deltas: list[Tensor],
    stats: Rescaled[list[MaskCache]],
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
    """della_linear, adding only elements that have the elected sign (TIES). int8_mask has no effect."""
    masked = apply_rank_masks(deltas, block, density, epsilon, stats.selection)
    return sign_consensus_sum(masked, weight, normalize, lambda_, stats.ratios)
