"""k-means against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest

from mergeforge.adapters.peft.k_means import k_means


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns", "count", "steps"), [(60, 5, 3, 10), (900, 40, 7, 10), (300, 2, 4, 300)])
def test_clusters_equal_those_of_scikit_learn(rows: int, columns: int, count: int, steps: int, seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    model = cluster.KMeans(count, init="random", n_init=1, max_iter=steps, random_state=seed + 11)
    assert np.array_equal(k_means(points, count, steps, seed + 11), model.fit_predict(points))
