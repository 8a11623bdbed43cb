"""karcher: the Riemannian (Karcher) mean of the models' directions, found by iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import Reduction, Statistics, reduction
from mergeforge.methods.statistics import InnerProducts, norms

if TYPE_CHECKING:
    from mergeforge.methods.statistics import Matrix


def factors(tensor: Statistics, max_iter: int, tol: float) -> list[float]:
    """The factor of each input in the mean, at the inputs' mean length."""
    import numpy as np

    products = tensor.collect(InnerProducts())
    count = len(products)
    if count <= 1:
        return [1.0] * tensor.input_count
    lengths = norms(products)
    valid = lengths > tol
    if not valid.any():
        return [0.0] * count
    scale = np.where(valid, 1 / np.where(valid, lengths, 1), 0)
    unit_products = products * np.outer(scale, scale)
    mean = _mean(unit_products, valid / valid.sum(), max_iter, tol)
    return [float(weight) for weight in mean * scale * lengths.mean()]


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


@reduction("karcher", scratch_blocks=1, needs_stats=True, within=WITHIN)
def karcher(tensor: Statistics, *, max_iter: float = 10, tol: float = 1e-5) -> Reduction:
    """The point on the sphere with the least squared distance to all models, at their mean length.

    Starts at the mean of the directions; stops after a step shorter than `tol`, or after `max_iter` steps.
    """
    return Reduction(factors(tensor, int(max_iter), tol), fused=True)
