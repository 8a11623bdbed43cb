"""Low-rank factors of a matrix: D ~ L R, with L (rows, r) and R (r, columns), sqrt(S) on both sides.

A matrix is only accessed in passes: a RowScan yields its blocks of rows in order, so it need not fit into memory.
svd_gram takes the eigenvectors of the smaller Gram matrix in float64. svd_randomized (Halko, Martinsson and Tropp 2011,
https://arxiv.org/abs/0909.4061) finds the row space from random vectors by subspace iteration on D^T D: each iteration
is one pass, and it holds only (columns + rows) x (r + OVERSAMPLING) numbers. truncate_product truncates a sum of
low-rank products by QR and the SVD of the small core; the dense matrix never exists.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RowScan = Callable[[], Iterator[tuple[int, "Tensor"]]]  # one pass over D: yields (first row, rows in float32) in order
OVERSAMPLING = 16  # random vectors beyond the rank
ITERATIONS = 3  # of D^T D: as good as 2.5 power iterations of the range finder
BLOCK_ELEMENTS = 1 << 19  # elements of a block of a matrix in memory
CANCELLED = 1e-13  # relative size of a float64 sum whose terms cancel
NOISE = 1e-6  # singular values below this fraction of the largest are rounding errors of float32 weights


@dataclass(frozen=True)
class Factors:
    """L (rows, r), R (r, columns) and the squares of their singular values (float64, falling).

    `squared_norm`: |D|^2 (Frobenius). r is 0 if D is zero.
    """

    left: Tensor
    right: Tensor
    squares: Tensor
    squared_norm: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def energy(self) -> float:
        """The fraction of |D|^2 that the factors keep, by their singular values."""
        return min(float(self.squares.sum()) / self.squared_norm, 1.0) if self.squared_norm else 1.0

    @property
    def tail(self) -> float:
        """|D - L R| / |D| by the singular values; below about 1e-7 it is rounding."""
        return math.sqrt(max(1.0 - float(self.squares.sum()) / self.squared_norm, 0.0)) if self.squared_norm else 0.0


class SquareSum:
    """The sum of the squares of blocks, in float64. Reading `value` waits for the device.

    Its buffer is allocated once, because many small tensors between large ones fragment glibc's heap.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._wide: Tensor | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Add a block; returns it in float64, valid until the next call."""
        import torch

        if self._wide is None or self._wide.numel() < rows.numel():
            device = "cpu" if rows.device.type == "mps" else rows.device  # MPS has no float64
            self._wide = torch.empty(rows.numel(), dtype=torch.float64, device=device)
        if self._total is None:
            self._total = self._wide.new_zeros(())
        doubles = self._wide[: rows.numel()].view(rows.shape).copy_(rows)
        self._total += doubles.flatten() @ doubles.flatten()
        return doubles

    @property
    def value(self) -> float:
        return float(self._total) if self._total is not None else 0.0


def is_gram_cheaper(shape: tuple[int, int], rank: int | None) -> bool:
    """Whether svd_gram costs no more than svd_randomized; depends on the shape and rank alone."""
    return rank is None or min(shape) <= max(4 * (rank + OVERSAMPLING), 256)


def svd_gram_nbytes(shape: tuple[int, int], rank: int | None) -> int:
    """The memory of svd_gram besides a block: the Gram matrix, its eigenvectors and their workspace."""
    small = min(shape)
    return 36 * small * small + 8 * min(rank or small, small) * sum(shape)


def svd_randomized_nbytes(shape: tuple[int, int], rank: int) -> int:
    """The memory of svd_randomized besides a block."""
    width = min(rank + OVERSAMPLING, *shape)
    return 40 * shape[1] * width + 4 * shape[0] * width + 8 * min(rank, width) * sum(shape)


def svd_gram(scan: RowScan, shape: tuple[int, int], rank: int | None, energy: float | None = None) -> Factors:
    """The best factors of at most `rank`, or of the smallest rank that keeps `energy` of |D|^2.

    Two passes. Its memory grows with the columns; use svd_dense for a wide matrix in memory.
    """
    gram, square = None, SquareSum()
    for _, rows in scan():
        doubles = square.add(rows)
        gram = doubles.t() @ doubles if gram is None else gram.addmm_(doubles.t(), doubles)
    assert gram is not None
    squares, vectors = _eigen(gram)
    del gram
    rank_kept = choose_rank(squares, square.value, rank, energy)
    root = squares[:rank_kept] ** 0.25
    projection, right = vectors[:, :rank_kept] / root, (vectors[:, :rank_kept] * root).t()
    return _from_right(scan, shape, projection, right, squares[:rank_kept], square.value)


def svd_dense(matrix: Tensor, rank: int | None, energy: float | None = None) -> Factors:
    """svd_gram of a matrix in memory, over its shorter side."""
    rows, columns = matrix.shape
    if rows >= columns:
        return svd_gram(lambda: _row_blocks(matrix), (rows, columns), rank, energy)
    transposed = svd_gram(lambda: _row_blocks(matrix.t()), (columns, rows), rank, energy)
    return replace(transposed, left=transposed.right.t().contiguous(), right=transposed.left.t().contiguous())


def _row_blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    height = max(16, BLOCK_ELEMENTS // max(matrix.shape[1], 1))
    for start in range(0, matrix.shape[0], height):
        yield start, matrix[start : start + height]


def svd_randomized(
    scan: RowScan,
    shape: tuple[int, int],
    rank: int,
    energy: float | None = None,
    *,
    seed: str = "",
    device: str = "cpu",
) -> Factors:
    """Nearly the best factors of at most `rank`; ITERATIONS + 1 passes.

    The same `seed` gives the same factors. If `energy` needs more than `rank`, the result has `rank`.
    """
    import torch

    width = min(rank + OVERSAMPLING, *shape)
    basis = _random((shape[1], width), seed).to(device)
    square = SquareSum()
    product, image = torch.empty_like(basis), _double(basis)
    doubles = torch.empty_like(image)
    for _ in range(ITERATIONS):
        square = SquareSum()
        image.zero_()
        for _, rows in scan():
            image += doubles.copy_(torch.mm(rows.t(), rows @ basis, out=product))
            square.add(rows)
        if not square.value or not math.isfinite(square.value):
            return Factors(basis.new_zeros(shape[0], 0), basis.new_zeros(0, shape[1]), image[0, :0], square.value)
        basis = _single(torch.linalg.qr(image).Q, basis)
    del image, doubles, product
    return _within(scan, shape, basis, square.value, rank, energy)


def _within(
    scan: RowScan, shape: tuple[int, int], basis: Tensor, square: float, rank: int, energy: float | None
) -> Factors:
    """The best factors whose rows lie in the span of `basis` (columns, width): the SVD of D basis."""
    import torch

    image = basis.new_empty(shape[0], basis.shape[1])
    gram = _double(basis).new_zeros(basis.shape[1], basis.shape[1])
    for start, rows in scan():
        doubles = _double(torch.mm(rows, basis, out=image[start : start + len(rows)]))
        gram.addmm_(doubles.t(), doubles)
    squares, vectors = _eigen(gram)
    rank_kept = choose_rank(squares, square, rank, energy)
    root = squares[:rank_kept] ** 0.25
    left = image @ _single(vectors[:, :rank_kept] / root, basis)
    right = _single(vectors[:, :rank_kept] * root, basis).t() @ basis.t()
    return Factors(left, right, squares[:rank_kept], square)


def squared_residual(scan: RowScan, left: Tensor, right: Tensor) -> float:
    """|D - L R|^2, measured block by block in one pass."""
    import torch

    square, product = SquareSum(), None
    for start, rows in scan():
        product = torch.empty_like(rows) if product is None else product
        out = product[: len(rows)]
        square.add(torch.addmm(rows, left[start : start + len(rows)], right, alpha=-1, out=out))
    return square.value


def truncate_product(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], rank: int | None, energy: float | None = None
) -> Factors:
    """The best factors of sum(L_i R_i), in float64, by QR of both stacks and the SVD of their core."""
    import torch

    rows, upper = torch.linalg.qr(torch.cat(list(lefts), dim=1).double())
    columns, lower = torch.linalg.qr(torch.cat(list(rights)).double().t())
    u, singular, vh = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    singular *= singular > CANCELLED * upper.norm() * lower.norm()
    squares = singular.square()
    square = float(squares.sum())
    rank_kept = choose_rank(squares, square, rank, energy)
    root = singular[:rank_kept].sqrt()
    return Factors(
        rows @ (u[:, :rank_kept] * root), (columns @ (vh[:rank_kept].t() * root)).t(), squares[:rank_kept], square
    )


def choose_rank(squares: Tensor, square: float, rank: int | None, energy: float | None) -> int:
    """How many of the falling squares to keep: those above the noise, at most `rank`, just enough for `energy`."""
    if not len(squares) or not square > 0:
        return 0
    largest = int((squares > squares[0] * NOISE**2).sum())
    largest = min(largest, rank) if rank is not None else largest
    if energy is None:
        return largest
    enough = int((squares.cumsum(0) < energy * square * (1 - 1e-12)).sum()) + 1
    return min(largest, enough)


def _from_right(
    scan: RowScan, shape: tuple[int, int], projection: Tensor, right: Tensor, squares: Tensor, square: float
) -> Factors:
    """Compute L = D `projection`, for a known R."""
    import torch

    left = None
    for start, rows in scan():
        if left is None:
            left, projection = rows.new_empty(shape[0], right.shape[0]), _single(projection, rows)
        torch.mm(rows, projection, out=left[start : start + len(rows)])
    assert left is not None
    return Factors(left, _single(right, left), squares, square)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (falling, clamped at zero) and eigenvectors as columns; both empty if `gram` is not finite."""
    import torch

    if not bool(gram.diagonal().sum().isfinite()):
        return gram.diagonal()[:0], gram[:, :0]
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_(min=0), vectors.flip(1)


def _double(rows: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device has no float64."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def _single(value: Tensor, like: Tensor) -> Tensor:
    """Convert back to the dtype and device of `like`."""
    return value.to(device=like.device, dtype=like.dtype).contiguous()


def _random(shape: tuple[int, int], seed: str) -> Tensor:
    import torch

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float32)
