"""karcher: the Riemannian (Karcher) mean of the models' directions, found by iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import BlockScan, method
from mergeforge.methods._inner_products import gram, lengths
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods._inner_products import Matrix


def weights(scan: BlockScan, numel: int, *, max_iter: float, tol: float) -> list[float]:
    """The weight of each input in the mean, at the inputs' mean length."""
    import numpy as np

    products = gram(scan)
    count = len(products)
    if count <= 1:
        return [1.0] * count
    norms = lengths(products)
    valid = norms > tol
    if not valid.any():
        return [0.0] * count
    scale = np.where(valid, 1 / np.where(valid, norms, 1), 0)
    unit_products = products * np.outer(scale, scale)
    mean = _mean(unit_products, valid / valid.sum(), int(max_iter), tol)
    return [float(weight) for weight in mean * scale * norms.mean()]


def _mean(unit_products: Matrix, share: Matrix, max_iter: int, tol: float) -> Matrix:
    """The mean of directions, as a weighted sum of them; `unit_products` are their inner products."""
    import numpy as np

    def length(vector: Matrix) -> float:
        return math.sqrt(max(float(vector @ unit_products @ vector), 0))

    first, norm = np.eye(len(share))[share.argmax()], length(share)
    mean = share / norm if norm >= tol else first
    for _ in range(max_iter):
        cosines = np.clip(unit_products @ mean, -1, 1)
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


def as_sum(stats: list[float], **_: object) -> WeightedSum:
    return WeightedSum(stats, fused=True)


@method("karcher", scratch_blocks=1, stats=weights, within=WITHIN, as_sum=as_sum)
def karcher(models: list[Tensor], stats: list[float], *, max_iter: float = 10, tol: float = 1e-5) -> Tensor:
    """The point on the sphere with the least squared distance to all models, at their mean length.

    Starts at the mean of the directions; stops after a step shorter than `tol`, or after `max_iter` steps.
    """
    return as_sum(stats).evaluate(models)
