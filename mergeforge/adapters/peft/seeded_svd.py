"""torch.svd_lowrank with a seed: it draws from torch's global generator, which is put back as it was."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_GENERATOR = Lock()


def seeded_svd_lowrank(matrix: Tensor, rank: int, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, rank), S and V (columns, rank) of a matrix on the CPU."""
    import torch

    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=steps)
    return u, s, v
