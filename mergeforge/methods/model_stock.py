"""model_stock: how far to go from the base to the average, from the angles between task vectors.

Jang et al., "Model Stock: All we need is just a few fine-tuned models", https://arxiv.org/abs/2403.19522.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from mergeforge.methods import Reduction, Statistics, method
from mergeforge.methods.statistics import InnerProducts, norms
from mergeforge.methods.sub_blocks import by_rows

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6  # lower limit of a product of norms, and of the denominator


def interpolation_ratio(tensor: Statistics) -> float:
    """The share of the average, from the mean cosine of all pairs."""
    import numpy as np

    products = tensor.collect(InnerProducts())
    count = len(products)
    if count < 2:
        return 0.0
    lengths = norms(products)
    cosines = np.clip(products / np.maximum(np.outer(lengths, lengths), TINY), -1, 1)
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) >= TINY else 0.0


def whole_tensor(tensor: Statistics) -> Reduction:
    """The step towards the average, with one ratio for the tensor."""
    count = tensor.input_count
    return Reduction([interpolation_ratio(tensor) / count] * count, fused=True)


def stats(tensor: Statistics, *, filter_wise: bool) -> Reduction | None:
    """The step for a tensor that is a single row; None where each row has its own ratio."""
    return whole_tensor(tensor) if tensor.first_block.is_vector else None


@method(
    "model_stock",
    scratch_blocks=1,
    inputs=(2, 1 << 16),
    stats=stats,
    reduce=lambda tensor, **_: whole_tensor(tensor),
    reduces=lambda *, filter_wise: not filter_wise,
)
def model_stock(deltas: list[Tensor], *, filter_wise: bool = False) -> Tensor:
    """base + t * mean(deltas), t = N cos / (1 + (N - 1) cos); with filter_wise a t for each row.

    cos is the mean cosine of all pairs of the N task vectors. Where t is undefined (N vectors that
    oppose each other) the result is the base.
    """
    count = len(deltas)
    for rows in by_rows(deltas):
        row_ratios = _row_ratios(rows)
        total = rows[0].mul_(1 / count)
        for more in rows[1:]:
            total.add_(more, alpha=1 / count)
        total.mul_(row_ratios)
    return deltas[0]


def _row_ratios(rows: list[Tensor]) -> Tensor:
    """t for each row, as a column."""
    count = len(rows)
    norms: list[Tensor] = [row.norm(dim=1) for row in rows]
    cosine = norms[0].new_zeros(norms[0].shape)
    for first, second in combinations(range(count), 2):
        product = (rows[first] * rows[second]).sum(dim=1)
        cosine.add_(product.div_((norms[first] * norms[second]).clamp_(min=TINY)).clamp_(-1, 1))
    cosine.div_(count * (count - 1) / 2)
    denominator = cosine.mul(count - 1).add_(1)
    singular = denominator.abs() < TINY
    t = cosine.mul_(count).div_(denominator.masked_fill_(singular, 1))
    return t.masked_fill_(singular, 0).unsqueeze(1)
