"""karcher: the Riemannian (Karcher) mean of the models' directions, found by iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import Look, method
from mergeforge.methods._inner_products import gram, lengths
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods._inner_products import Matrix


def weights(look: Look, numel: int, *, max_iter: float, tol: float) -> list[float]:
    """The weight of each input in the mean, at the inputs' mean length."""
    import numpy as np

    products = gram(look)
    count = len(products)
    if count <= 1:
        return [1.0] * count
    norms = lengths(products)
    valid = norms > tol
    if not valid.any():
        return [0.0] * count
    scale = np.where(valid, 1 / np.where(valid, norms, 1), 0)
    units = products * np.outer(scale, scale)
    mean = _mean(units, valid / valid.sum(), int(max_iter), tol)
    return [float(one) for one in mean * scale * norms.mean()]


def _mean(units: Matrix, share: Matrix, most: int, tol: float) -> Matrix:
    """The mean of directions, as a weighted sum of them; `units` are their inner products."""
    import numpy as np

    def length(vector: Matrix) -> float:
        return math.sqrt(max(float(vector @ units @ vector), 0))

    first, norm = np.eye(len(share))[share.argmax()], length(share)
    mean = share / norm if norm >= tol else first
    for _ in range(most):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        pull = np.where(angles >= tol, share * angles / np.maximum(np.sin(angles), 1e-12), 0)
        tangent = pull - float(pull @ cosines) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        norm = length(mean)
        mean = mean / norm if norm > tol else mean
    return mean


WITHIN = {"max_iter": Interval(0, 1000), "tol": Interval(0, 1, open_low=True)}


def as_sum(facts: list[float], **_: object) -> WeightedSum:
    return WeightedSum(facts, fused=True)


@method("karcher", live=1, facts=weights, within=WITHIN, as_sum=as_sum)
def karcher(models: list[Tensor], facts: list[float], *, max_iter: float = 10, tol: float = 1e-5) -> Tensor:
    """The point on the sphere with the least squared distance to all models, at their mean length.

    Steps from the mean of the directions until one is shorter than `tol`, or `max_iter` were taken.
    """
    return as_sum(facts).of(models)
