"""The random places in a weight that FourierFT and WaveFT train: the start of a permutation of all its elements."""

from __future__ import annotations

from functools import cache, lru_cache
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CHECKED = (1 << 18, 300)  # elements, places: how far the shortcut is compared with torch.randperm
_LOCK = Lock()


def random_places(seed: int, numel: int, count: int) -> Tensor:
    """torch.randperm(numel)[:count] with this seed, on the CPU. Layers of one shape share the result."""
    with _LOCK:
        return _random_places(seed, numel, count)


@lru_cache(maxsize=64)
def _random_places(seed: int, numel: int, count: int) -> Tensor:
    if 0 <= seed < 1 << 32 and numel < 1 << 31 and _shortcut_holds():
        return _start_of_permutation(seed, numel, count)
    return _permutation(seed, numel)[:count].clone()


@cache
def _shortcut_holds() -> bool:
    """Whether this version of torch shuffles as _start_of_permutation does."""
    return _start_of_permutation(7, *_CHECKED).equal(_permutation(7, _CHECKED[0])[: _CHECKED[1]])


def _permutation(seed: int, numel: int) -> Tensor:
    import torch

    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))


def _start_of_permutation(seed: int, numel: int, count: int) -> Tensor:
    """The first steps of the Fisher-Yates shuffle of torch.randperm (ATen, randperm_cpu), without the rest of it.

    Step i swaps element i with element i + bits % (numel - i), with 32 bits of the Mersenne Twister: numpy has
    the same generator.
    """
    import numpy as np
    import torch

    bits = np.random.RandomState(seed).randint(0, 1 << 32, size=count, dtype=np.uint32).tolist()
    moved: dict[int, int] = {}  # place -> the element that an earlier step put there
    places = []
    for step in range(count):
        other = step + bits[step] % (numel - step)
        places.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    return torch.tensor(places)
