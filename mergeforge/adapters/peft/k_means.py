"""k-means from random rows as scikit-learn computes it, without scikit-learn (cluster/_kmeans.py, Lloyd)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def k_means(rows: NDArray[Any], count: int, steps: int, seed: int, tolerance: float = 1e-4) -> NDArray[Any]:
    """The cluster of each row, as KMeans(count, init="random", n_init=1, max_iter=steps).fit_predict tells it.

    It is computed in float64: a row that is equally far from two centers, to 1e-7, may get the other one. A cluster
    that loses all its rows stays where it is; scikit-learn would move it.
    """
    points = (rows - rows.mean(axis=0)).astype(np.float64)
    chances = np.ones(len(rows), np.float32)
    chances /= chances.sum()
    centers = points[np.random.RandomState(seed).choice(len(rows), size=count, replace=False, p=chances)]
    bound = tolerance * points.var(axis=0).mean()
    labels = np.full(len(rows), -1)
    for _ in range(steps):
        previous, labels = labels, _nearest(points, centers)
        moved = _centers(points, labels, centers)
        shift = np.square(moved - centers).sum()
        centers = moved
        if np.array_equal(labels, previous):
            return labels
        if shift <= bound:
            break
    return _nearest(points, centers)


def _nearest(points: NDArray[Any], centers: NDArray[Any]) -> NDArray[Any]:
    distances = np.square(centers).sum(axis=1) - 2 * points @ centers.T
    nearest: NDArray[Any] = distances.argmin(axis=1)
    return nearest


def _centers(points: NDArray[Any], labels: NDArray[Any], old: NDArray[Any]) -> NDArray[Any]:
    groups = [points[labels == label] for label in range(len(old))]
    return np.stack([group.mean(axis=0) if len(group) else center for group, center in zip(groups, old, strict=True)])
