"""Factors of matrices that are read in blocks of rows, compared with the dense SVD."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mergeforge.core.low_rank_svd import (
    Factors,
    RowScan,
    choose_rank,
    is_gram_cheaper,
    squared_residual,
    svd_dense,
    svd_gram,
    svd_randomized,
    truncate_product,
)

Way = Callable[[Tensor, int | None], Factors]


def scan_of(matrix: Tensor, height: int = 37) -> RowScan:
    def scan() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(matrix), height):
            yield start, matrix[start : start + height]

    return scan


def by_random_vectors(matrix: Tensor, rank: int | None) -> Factors:
    assert rank is not None
    return svd_randomized(scan_of(matrix), tuple(matrix.shape), rank, seed="a tensor")


def by_gram(matrix: Tensor, rank: int | None) -> Factors:
    return svd_gram(scan_of(matrix), tuple(matrix.shape), rank)


WAYS = {"exact": by_gram, "held": svd_dense, "randomized": by_random_vectors}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def falling(rows: int, columns: int) -> Tensor:
    """A matrix with singular values 1, 1/2, 1/3, ..."""
    u, s, vh = torch.linalg.svd(normal(rows, columns), full_matrices=False)
    return (u / torch.arange(1, len(s) + 1)) @ vh


def tail(matrix: Tensor, rank: int) -> float:
    """|D - D_rank| / |D| of the best approximation."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float((squares[rank:].sum() / squares.sum()).sqrt())


def error(matrix: Tensor, factors: Factors) -> float:
    return float((matrix - factors.left @ factors.right).norm() / matrix.norm())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (64, 64)])
def test_recovers_a_low_rank_matrix(way: Way, shape: tuple[int, int]) -> None:
    matrix = normal(shape[0], 5) @ normal(5, shape[1], seed=1)
    found = way(matrix, 12)
    assert found.rank == 5
    assert error(matrix, found) < 1e-6
    assert found.energy == pytest.approx(1)


@pytest.mark.parametrize("way", [by_gram, svd_dense])
@pytest.mark.parametrize("matrix", [normal(90, 60), normal(60, 90), falling(90, 60)])
def test_exact_error_equals_the_dense_tail(way: Way, matrix: Tensor) -> None:
    found = way(matrix, 8)
    assert error(matrix, found) == pytest.approx(tail(matrix, 8), abs=1e-5)
    assert found.tail == pytest.approx(tail(matrix, 8), abs=1e-5)


@pytest.mark.parametrize("matrix", [normal(300, 200), normal(200, 300), falling(300, 200)])
def test_randomized_error_is_within_a_percent_of_the_dense_tail(matrix: Tensor) -> None:
    assert error(matrix, by_random_vectors(matrix, 16)) < 1.01 * tail(matrix, 16)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_both_factors_hold_the_square_root_of_the_singular_values(way: Way) -> None:
    found = way(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 2)
    assert torch.allclose(found.left.t() @ found.left, torch.diag(torch.tensor([9.0, 4.0])), atol=1e-5)
    assert torch.allclose(found.right @ found.right.t(), torch.diag(torch.tensor([9.0, 4.0])), atol=1e-5)
    assert found.squares.tolist() == pytest.approx([81, 16])
    assert found.squared_norm == pytest.approx(98)


def test_residual_of_given_factors() -> None:
    matrix = falling(90, 60)
    found = svd_dense(matrix, 8)
    left, right = found.left.bfloat16().float(), found.right.bfloat16().float()
    wanted = float((matrix.double() - left.double() @ right.double()).square().sum())
    assert squared_residual(scan_of(matrix), left, right) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("height", [1, 16, 300])
def test_randomized_does_not_depend_on_the_blocks(height: int) -> None:
    matrix = falling(120, 80)
    one, other = (svd_randomized(scan_of(matrix, each), (120, 80), 8, seed="s") for each in (37, height))
    assert torch.allclose(one.left @ one.right, other.left @ other.right, atol=1e-5)


def test_the_same_seed_gives_the_same_factors() -> None:
    matrix = falling(120, 80)
    one, other = by_random_vectors(matrix, 8), by_random_vectors(matrix, 8)
    assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_zero_has_rank_zero(way: Way) -> None:
    found = way(torch.zeros(40, 30), 4)
    assert (found.rank, found.squared_norm, found.energy) == (0, 0.0, 1.0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nan_propagates_to_the_norm(way: Way) -> None:
    matrix = normal(40, 30)
    matrix[3, 4] = torch.nan
    assert way(matrix, 4).squared_norm != way(matrix, 4).squared_norm


def test_chooses_the_smallest_rank_that_keeps_the_energy() -> None:
    squares = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    assert [choose_rank(squares, 10.0, None, energy) for energy in (0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert choose_rank(squares, 10.0, 2, 0.99) == 2
    assert choose_rank(squares, 10.0, 2, None) == 2


def test_randomized_is_cheaper_only_for_small_ranks() -> None:
    assert is_gram_cheaper((64, 4096), 32) and is_gram_cheaper((4096, 4096), None)
    assert not is_gram_cheaper((4096, 4096), 64)


def test_truncate_product_equals_the_dense_svd_of_the_sum() -> None:
    lefts, rights = [normal(50, 6), normal(50, 4, seed=1)], [normal(6, 70, seed=2), normal(4, 70, seed=3)]
    dense = lefts[0] @ rights[0] + lefts[1] @ rights[1]
    found = truncate_product(lefts, rights, 3)
    u, s, vh = torch.linalg.svd(dense.double())
    assert torch.allclose(found.left @ found.right, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)
    assert found.tail == pytest.approx(tail(dense, 3), abs=1e-6)


def test_truncate_product_of_more_columns_than_rows() -> None:
    lefts, rights = [normal(6, 9)], [normal(9, 20, seed=2)]
    found = truncate_product(lefts, rights, None)
    assert found.rank == 6
    assert torch.allclose(found.left @ found.right, (lefts[0] @ rights[0]).double(), atol=1e-5)
