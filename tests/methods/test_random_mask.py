"""Masks depend on seed, tensor, input and element, on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergeforge.methods import Block
from mergeforge.methods.keep import KeepRandom
from mergeforge.methods.random_mask import (
    _sample_bits,
    _sample_bits_on_device,
    _samples_below,
    random_mask,
)

N = 100_000
KEYS = (0x89ABCDEF, 0x12345678), (0x0F1E2D3C, 0x4B5A6978)
PINNED = (
    [1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0],
    [0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0],
)


def mask(
    start: int = 0, count: int = N, *, tensor: str = "w", seed: int = 0, index: int = 0, density: float = 0.5
) -> torch.Tensor:
    return random_mask(torch.empty(count, 1), Block(tensor, start, seed), index, density).flatten()


@pytest.mark.parametrize("first", [0, 1, 12_345, (1 << 31) - 3 * 16, 5 << 31])
@pytest.mark.parametrize("cut", [1, 7, 16, 40, 47])
def test_any_split_of_the_tensor_draws_the_same_mask(first: int, cut: int) -> None:
    whole = mask(first, 48)
    assert torch.equal(torch.cat([mask(first, cut), mask(first + cut, 48 - cut)]), whole)


def test_masks_beyond_2_to_the_31_elements_differ() -> None:
    assert not torch.equal(mask(1 << 31), mask(0))
    assert not torch.equal(mask(1 << 32), mask(0))
    assert not torch.equal(mask(1 << 32), mask(1 << 31))
    assert torch.equal(mask((1 << 31) - 64, 64), mask((1 << 31) - 128, 128)[64:])


@pytest.mark.parametrize("density", [2.0**-16, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 2.0**-16])
def test_mask_has_the_requested_density(density: float) -> None:
    count = 10 * N
    kept = int(mask(count=count, density=density).sum())
    assert abs(kept - density * count) <= 4 * math.sqrt(count * density * (1 - density)) + 1


def test_masks_are_independent_of_each_other() -> None:
    """Two masks agree by chance only; so do neighbours, rows and columns of one mask."""
    one = mask()
    others = [mask(tensor="v"), mask(seed=1), mask(index=1), mask(tensor="w/1"), mask(seed=1 << 40), mask(start=N)]
    shifted = [one.roll(by) for by in (1, 2, 3, 16, 64, 256, 4096, 65536)]
    for other in others + shifted:
        assert abs(float((one == other).float().mean()) - 0.5) < 5 / math.sqrt(4 * N)


def test_mask_keys_are_unambiguous() -> None:
    assert not torch.equal(mask(tensor="a/1", index=2), mask(tensor="a", index=12))
    assert not torch.equal(mask(tensor="1/w", seed=1), mask(tensor="w", seed=11))


def test_larger_density_keeps_a_superset() -> None:
    assert bool((mask(density=0.3) <= mask(density=0.6)).all())


def test_mask_values_are_pinned() -> None:
    """They decide the bytes of every DARE merge: another version must not change them."""
    assert mask(0, 24).int().tolist() == PINNED[0]
    assert mask((1 << 31) + 5, 24, tensor="model.norm.weight", seed=7, index=2, density=0.3).int().tolist() == PINNED[1]


def test_mask_has_the_shape_of_the_tensor() -> None:
    like = torch.empty(3, 4, dtype=torch.float64)
    drawn = random_mask(like, Block("w", 8, 0), 0, 0.5)
    assert drawn.shape == like.shape
    assert torch.equal(drawn.flatten(), mask(8, 12))


@pytest.mark.parametrize("start", [0, 3, 1 << 19, (1 << 31) - 64, 7 << 31])
def test_numpy_and_torch_draw_the_same_bits(start: int) -> None:
    """More than one piece; torch's hash is what other devices run."""
    like = torch.empty((1 << 17) + 5)
    drawn = _sample_bits(start & 0x7FFFFFFF, like.numel(), *KEYS)
    assert np.array_equal(drawn, _sample_bits_on_device(start & 0x7FFFFFFF, like, *KEYS).numpy())


@pytest.mark.parametrize("limit", [1, 255, 256, 257, 0x8000, 0x8001, 0xFF00, 0xFFFF])
@pytest.mark.parametrize("start", [0, 7])
def test_lower_byte_decides_ties_of_the_upper_byte(limit: int, start: int) -> None:
    """Every limit cuts the same draws, whether all of their bytes are hashed or only those that matter."""
    count = 1 << 20
    assert np.array_equal(_samples_below(limit, start, count, *KEYS), _sample_bits(start, count, *KEYS) < limit)


@pytest.mark.parametrize("start", [0, 5])
def test_one_density_per_element(start: int) -> None:
    densities = torch.full((100, 7), 0.3)
    densities[::2] = 0.9
    drawn = random_mask(torch.empty(100, 7), Block("w", start, 0), 0, densities)
    for row, density in ((0, 0.9), (1, 0.3)):
        assert torch.equal(drawn[row::2].flatten(), mask(start, 700, density=density).view(100, 7)[row::2].flatten())


def test_random_bits_are_uniform() -> None:
    """As many of each sixteenth, from each byte of the hashes, and no byte tells of its neighbours or of the lower."""
    drawn = _sample_bits(0, 10 * N, *KEYS)
    upper, lower = drawn >> 8, drawn & 255
    for some in (upper, lower):
        for at in range(4):
            counts = np.bincount(some[at::4] >> 4, minlength=16)
            assert np.abs(counts - len(drawn) / 64).max() < 5 * math.sqrt(len(drawn) / 64)
    pairs = [(upper[at::4], upper[other::4]) for at in range(4) for other in range(at)]
    for one, other in [*pairs, (upper, lower), (upper[:-4], upper[4:])]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))


def test_random_elements_are_dropped_in_place_and_density_1_keeps_all() -> None:
    first, second = torch.ones(50, 2), torch.ones(50, 2)
    KeepRandom([0.5, 1.0], Block("w", 0, 0)).drop([first, second], Block("w", 0, 0))
    assert torch.equal(first.flatten(), mask(0, 100).float())
    assert bool((second == 1).all())
