"""The smallest singular triplets of a matrix, as a product of two thin matrices.

They are eigenvectors of the smaller Gram matrix in float64. Signs and rotations of singular vectors do not matter:
only the product is used. A matrix with more rows than columns is read in passes; another must fit into memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeforge.core.low_rank_svd import RowScan

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_COLUMNS = 4096


def bottom_triplets(scan: RowScan, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """L (rows, rank) and R (rank, columns), whose product is the sum of the `rank` smallest triplets."""
    import torch

    if shape[1] > shape[0]:
        return _of_wide_matrix(read_dense(scan, shape), rank)
    gram: Any = 0
    for _, rows in scan():
        doubles = to_double(rows)
        gram = gram + doubles.t() @ doubles
    vectors = _bottom_eigenvectors(gram, rank)
    return torch.cat([to_double(rows) @ vectors for _, rows in scan()]), vectors.t()


def bottom_triplets_nbytes(shape: tuple[int, int], rank: int) -> int:
    """The memory of bottom_triplets: the Gram matrix, its eigenvectors and their workspace, and both factors."""
    small = min(shape)
    dense = 4 * shape[0] * shape[1] + 16 * small * _BLOCK_COLUMNS if shape[1] > shape[0] else 0
    return 36 * small * small + 16 * rank * sum(shape) + dense


def to_double(rows: Tensor) -> Tensor:
    """In float64, on the CPU if the device has no float64 (MPS)."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def read_dense(scan: RowScan, shape: tuple[int, int]) -> Tensor:
    """All of a matrix in float32."""
    matrix: Tensor | None = None
    for start, rows in scan():
        matrix = rows.new_empty(shape) if matrix is None else matrix
        matrix[start : start + len(rows)].copy_(rows)
    assert matrix is not None
    return matrix


def _of_wide_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U U^T W of a matrix with more columns than rows."""
    gram: Any = 0
    for start in range(0, matrix.shape[1], _BLOCK_COLUMNS):
        doubles = to_double(matrix[:, start : start + _BLOCK_COLUMNS])
        gram = gram + doubles @ doubles.t()
    vectors = _bottom_eigenvectors(gram, rank).to(matrix)
    return vectors, vectors.t() @ matrix


def _bottom_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the smallest eigenvalues, as columns; none if the weights are not finite."""
    import torch

    if not bool(gram.diagonal().sum().isfinite()):
        return gram[:, :0]
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, :rank].contiguous()
