"""nuslerp: spherical interpolation with weights, over whole tensors or over their rows or columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mergeforge.methods import Reduction, Statistics, method
from mergeforge.methods.statistics import EveryBlock, InnerProducts
from mergeforge.methods.sub_blocks import by_rows

if TYPE_CHECKING:
    from torch import Tensor

MIN_NORM = 1e-7
COLUMNS_NBYTES = 4 * 8 << 18  # for each input, 262,144 columns: more than any vocabulary has
STRAIGHT = 2.0**-23  # of the squared sine: float32 cannot tell less from a straight line

Columns = tuple["Tensor", "Tensor"]


def _t(weight: list[float]) -> float:
    total = weight[0] + weight[1]
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def whole_tensor(tensor: Statistics, weight: list[float]) -> Reduction:
    """The interpolation with one angle for the tensor."""
    t = _t(weight)
    products = tensor.collect(InnerProducts())
    if not len(products):
        return Reduction([1 - t, t])
    lengths = [max(math.sqrt(max(products[at, at], 0)), MIN_NORM) for at in range(2)]
    cosine = max(-1.0, min(1.0, products[0, 1] / lengths[0] / lengths[1]))
    if 1 - cosine * cosine <= STRAIGHT:
        return Reduction([1 - t, t])
    angle = math.acos(cosine)
    return Reduction([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def stats(
    tensor: Statistics, *, weight: list[float], nuslerp_row_wise: bool, **_: object
) -> Reduction | Columns | None:
    """For a tensor that is a single row, its interpolation; else the factors of each column, or None for rows."""
    if tensor.first_block.is_vector:
        return whole_tensor(tensor, weight)
    return _column_coefficients(tensor, _t(weight)) if nuslerp_row_wise else None


def _column_coefficients(tensor: Statistics, t: float) -> Columns | None:
    """A row of factors for each input, from squares and products summed down the columns."""
    total: list[Tensor] = []

    def add(inputs: list[Tensor], block: object) -> None:
        sums = list(_sums(inputs, dim=0))
        total[:] = [column.add_(more) for column, more in zip(total, sums, strict=True)] if total else _double(sums)

    tensor.collect(EveryBlock(add))
    return _factors(total, t) if total else None


def _sums(inputs: list[Tensor], dim: int) -> Iterator[Tensor]:
    """The first input's squares, the second's, and their products, summed over a dimension."""
    first, second = inputs
    for left, right in ((first, first), (second, second), (first, second)):
        yield (left * right).sum(dim=dim)


def _double(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.double() for value in values]


def _factors(sums: list[Tensor], t: float) -> tuple[Tensor, Tensor]:
    """sin((1 - t) a) / sin(a) and sin(t a) / sin(a) for the angles a; 1 - t and t where the angle is almost zero.

    Overwrites the sums (float64).
    """
    first_squares, second_squares, cosine = sums
    norms = first_squares.sqrt_().clamp_(min=MIN_NORM).mul_(second_squares.sqrt_().clamp_(min=MIN_NORM))
    cosine.div_(norms).clamp_(-1, 1)
    straight = 1 - cosine * cosine <= STRAIGHT
    angle = cosine.masked_fill_(straight, 0).acos_()
    sine = norms.copy_(angle).sin_()
    first = second_squares.copy_(angle).mul_(1 - t).sin_().div_(sine).masked_fill_(straight, 1 - t)
    return first, angle.mul_(t).sin_().div_(sine).masked_fill_(straight, t)


@method(
    "nuslerp",
    scratch_blocks=1,
    inputs=(2, 2),
    optional_base=True,
    stats=stats,
    stats_nbytes=COLUMNS_NBYTES,
    reduce=lambda tensor, *, weight, **_: whole_tensor(tensor, weight),
    reduces=lambda *, nuslerp_flatten, **_: nuslerp_flatten,
)
def nuslerp(
    models: list[Tensor],
    stats: Columns | None,
    *,
    weight: list[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Interpolate between two models (with a base: their task vectors) at w2 / (w1 + w2) of the arc.

    nuslerp_flatten: one angle for a tensor; else one for each row, or with nuslerp_row_wise one for
    each column (mergekit's names). Weights that sum to zero mean the middle.
    """
    if stats is not None:
        return _sum(models, stats)
    for rows in by_rows(models):
        _sum(rows, _factors([column[:, None] for column in _double(_sums(rows, dim=1))], _t(weight)))
    return models[0]


def _sum(inputs: list[Tensor], factors: Columns) -> Tensor:
    """The sum of two inputs times their factors (columns or rows), into the first."""
    first, second = inputs
    a, b = (factor.to(first.dtype) for factor in factors)
    return first.mul_(a).add_(second.mul_(b))
