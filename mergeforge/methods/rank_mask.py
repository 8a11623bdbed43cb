"""Random masks that keep larger elements more often: MagPrune of DELLA (https://arxiv.org/abs/2406.11617)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mergeforge.methods.block import Block
from mergeforge.methods.random_mask import random_mask
from mergeforge.methods.sub_blocks import by_rows

if TYPE_CHECKING:
    from torch import Tensor


def rank_mask(delta: Tensor, block: Block, index: int, density: float, epsilon: float) -> Tensor:
    """True with a probability that grows with the rank of an element's magnitude in its row."""
    return random_mask(delta, block, index, keep_probability(delta, block, density, epsilon))


def keep_probability(delta: Tensor, block: Block, density: float, epsilon: float) -> Tensor:
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
