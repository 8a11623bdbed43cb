"""Finding the k-th largest magnitude without a sort, against numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.method_blocks import InMemoryScan, of_scan

from mergeforge.methods import block_statistics, kth_largest, thresholds
from mergeforge.methods.keep import KeepMagnitudes
from mergeforge.methods.kth_largest import Threshold
from mergeforge.methods.task_vectors import keep_largest

N = 30_000


def noise(seed: int, count: int = N) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def bfloat16_like() -> torch.Tensor:
    base = noise(1).mul(0.02).bfloat16().float()
    return (base + 5e-4 * noise(2)).bfloat16().float() - base


def misleading(size: int = 1000) -> torch.Tensor:
    """The blocks that the sample sees hold only small numbers."""
    value = noise(3).mul(100)
    for start in InMemoryScan([value], size).starts(block_statistics.SAMPLE_BLOCKS):
        value[start : start + size] *= 1e-6
    return value


def misleading_up(size: int = 1000) -> torch.Tensor:
    """The blocks that the sample sees hold only large numbers."""
    value = noise(3).mul(1e-6)
    for start in InMemoryScan([value], size).starts(block_statistics.SAMPLE_BLOCKS):
        value[start : start + size] *= 1e9
    return value


def infinite() -> torch.Tensor:
    value = noise(4)
    value[::3] = float("inf")
    value[1::7] = -float("inf")
    return value


DATA = {
    "random": noise(0),
    "equal": torch.full((N,), -0.25),
    "two values": torch.where(noise(0) > 0, 1.0, 2.0),
    "bfloat16": bfloat16_like(),
    "zeros": torch.zeros(N),
    "mostly zeros": torch.where(noise(0) > 2, noise(1), torch.zeros(N)),
    "signed zeros": torch.where(noise(0) > 0, 0.0, -0.0),
    "tiny": noise(0) * 1e-37,
    "denormal": noise(0) * 1e-42,
    "every scale": noise(0) * torch.logspace(-44, 37, N),
    "rising": torch.linspace(0, 1, N),
    "falling": torch.linspace(1, 0, N),
    "misleading": misleading(),
    "misleading up": misleading_up(),
    "infinite": infinite(),
    "one element": torch.tensor([-3.0]),
    "two elements": torch.tensor([1.0, -1.0]),
    "few": noise(5, 7),
    "one large": torch.cat([torch.zeros(N - 1), torch.tensor([5.0])]),
}


def kept(value: torch.Tensor, density: float) -> np.ndarray:
    """Which elements stay: the first k of a stable sort by falling magnitude."""
    magnitudes = value.abs().numpy()
    stays = np.zeros(len(magnitudes), bool)
    stays[np.argsort(-magnitudes, kind="stable")[: max(1, int(density * len(magnitudes)))]] = True
    return stays


def trim(scan: InMemoryScan, at: int, threshold: Threshold) -> torch.Tensor:
    trimmed = [thresholds.trim(threshold, scan.block(start)[0][at], start == 0) for start in scan.starts()]
    return torch.cat([block.flatten() for block in trimmed])


def density_thresholds(scan: InMemoryScan, numel: int, density: list[float]) -> list[Threshold | None]:
    """The thresholds of ties for one density for each input."""
    keep = keep_largest(of_scan(scan, numel, len(density)), density=density)
    assert isinstance(keep, KeepMagnitudes)
    return [magnitudes and magnitudes.lower for magnitudes in keep.ranges]


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("name", DATA)
def test_the_threshold_is_exact(name: str, density: float) -> None:
    value = DATA[name]
    scan = InMemoryScan([value], 1000)
    (found,) = density_thresholds(scan, value.numel(), [density])
    assert found is not None
    stays = kept(value, density)
    magnitudes = value.abs().numpy()
    limit = magnitudes[stays].min()
    assert np.uint32(found.bits).view(np.float32) == limit
    assert found.ties == int((magnitudes == limit).sum())
    assert found.ties_kept == int((magnitudes[stays] == limit).sum())
    for _ in range(2):  # a merge of merges looks more than once
        assert torch.equal(trim(scan, 0, found), torch.where(torch.from_numpy(stays), value, 0.0))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_threshold_does_not_depend_on_the_block_size(size: int) -> None:
    value = DATA["bfloat16"][:2000]
    scan = InMemoryScan([value], size)
    (found,) = density_thresholds(scan, len(value), [0.5])
    assert found is not None and found.ties > found.ties_kept > 0
    assert torch.equal(trim(scan, 0, found), torch.where(torch.from_numpy(kept(value, 0.5)), value, 0.0))


def test_one_scan_finds_thresholds_of_several_inputs() -> None:
    values = [DATA["random"], DATA["bfloat16"], DATA["misleading"], DATA["zeros"]]
    densities = [0.2, 0.7, 0.4, 1.0]
    scan = InMemoryScan(values, 1000)
    found = density_thresholds(scan, N, densities)
    assert found[3] is None
    for at in range(3):
        threshold = found[at]
        assert threshold is not None
        expected = torch.where(torch.from_numpy(kept(values[at], densities[at])), values[at], 0.0)
        assert torch.equal(trim(scan, at, threshold), expected)


@pytest.mark.parametrize("values", [8, 1 << 16])
def test_search_with_more_candidates_than_it_holds(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are counted, and made coarser where there are more than 8; several looks narrow the range."""
    monkeypatch.setattr(kth_largest, "MAX_CANDIDATES", 64)
    monkeypatch.setattr(kth_largest, "MAX_DISTINCT", values)
    monkeypatch.setattr(block_statistics, "SAMPLE_ELEMENTS", 4)
    for name, value in DATA.items():
        scan = InMemoryScan([value], 500)
        (found,) = density_thresholds(scan, len(value), [0.37])
        assert found is not None
        assert torch.equal(trim(scan, 0, found), torch.where(torch.from_numpy(kept(value, 0.37)), value, 0.0)), name


def test_good_sample_needs_two_scans() -> None:
    """Also where a few columns are much larger than the rest."""
    looks = []

    class Counting(InMemoryScan):
        def __call__(self, visit, sample=0):  # type: ignore[no-untyped-def]
            looks.append(sample)
            return super().__call__(visit, sample)

    columns = noise(0, 1 << 21)
    columns.view(-1, 1024)[:, ::16] *= 20
    for value in (noise(0, 1 << 21), columns):
        looks.clear()
        density_thresholds(Counting([value], 1 << 18), len(value), [0.3])
        assert looks == [block_statistics.SAMPLE_BLOCKS, 0]


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("size", [100, 1000])
def test_nan_at_the_threshold_is_refused(share: float, size: int) -> None:
    value = noise(0, 4000)
    value[: int(share * len(value))] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN"):
        density_thresholds(InMemoryScan([value], size), len(value), [0.5])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1])
def test_nan_counts_as_the_largest_magnitude(bits: int) -> None:
    """Where a tensor holds a few, they stay: the run refuses them in what it writes."""
    value = noise(0, 1000)
    value[5::100] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    scan = InMemoryScan([value], 64)
    (found,) = density_thresholds(scan, 1000, [0.5])
    assert found is not None
    trimmed = trim(scan, 0, found)
    assert bool(trimmed[5::100].isnan().all())
    assert int((trimmed != 0).sum()) == 500
    with pytest.raises(ArithmeticError, match="NaN"):
        density_thresholds(scan, 1000, [0.005])


def test_empty_tensor_and_density_1_have_no_threshold() -> None:
    assert density_thresholds(InMemoryScan([torch.empty(0)], 10), 0, [0.5]) == [None]
    assert density_thresholds(InMemoryScan([torch.ones(3)], 10), 3, [1.0]) == [None]


def test_trim_is_in_place() -> None:
    value = torch.tensor([[3.0], [1.0], [2.0]])
    assert thresholds.trim(Threshold(magnitude_bits(2.0), 1, 1), value, True) is value
    assert value.flatten().tolist() == [3.0, 0.0, 2.0]


def test_float64_is_compared_in_float32() -> None:
    value = torch.tensor([[1 + 1e-12], [-1.0], [1 - 1e-12], [0.5]], dtype=torch.float64)
    scan = InMemoryScan([value.flatten()], 2)
    (found,) = density_thresholds(scan, 4, [0.5])
    assert found is not None
    assert trim(scan, 0, found).tolist() == [1 + 1e-12, -1.0, 0.0, 0.0]


def magnitude_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
