"""The C library on stored inputs, compared with torch on the same numbers."""

from __future__ import annotations

import math
import os
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mergeforge
from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.execute.change_stats import measure_change
from mergeforge.methods import Block, Reduction
from mergeforge.methods.keep import KeepMagnitudes, KeepRandom, KeepRanks, KeepVarying, MagnitudeRange
from mergeforge.methods.kth_largest import KthLargestSearch, Threshold, infinite_threshold
from mergeforge.methods.reduction import Combine
from mergeforge.methods.thresholds import VARIANCE, magnitude_bits, split_magnitudes
from mergeforge.methods.variance import variance
from mergeforge.native import bindings
from mergeforge.native.bindings import CHUNK
from mergeforge.tensors.native_inputs import NativeInput, NativeInputs, UnreadableInput, read_buffer_nbytes

pytestmark = pytest.mark.needs_kernels

STEPS = {2: CHUNK, 3: CHUNK, 4: 2 * CHUNK, 5: CHUNK}  # number of inputs -> elements that are read at once
HALVES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
STORED = [["BF16"] * 4, ["F16"] * 4, ["F32"] * 4, ["BF16", "F32", "F16", "BF16"]]
SUMS = [
    Reduction([0.3, -1.7, 0.25]),
    Reduction([0.3, -1.7, 0.25], fused=True),
    Reduction([0.3, 1.1, 0.25], normalize=True, scale=0.7),
    Reduction([1.0, -1.0, 0.0], normalize=True, min_divisor=1e-8),
]
WHOLE = Block("w", 0, 3)


def numbers(dtype: str, seed: int, rows: int = 9, columns: int = CHUNK // 3) -> Tensor:
    """Random values of many magnitudes, with zeros of both signs."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[:, ::7], values[:, 1::7] = 0.0, -0.0
    values[:, 2::7] *= 1e-6
    return values.to(torch_dtype(dtype))


def raw(one: Tensor) -> np.ndarray:
    return one.view(torch.uint8).numpy().reshape(-1)


def stacked(dtypes: list[str], based: bool, files: Path | None = None) -> tuple[NativeInputs, list[Tensor]]:
    """Inputs whose first row is number 5, in memory or in files, and their tensors as float32."""
    return placed(dtypes, [numbers(dtype, seed) for seed, dtype in enumerate(dtypes)], based, files)


def placed(
    dtypes: list[str], tensors: list[Tensor], based: bool, files: Path | None, first: int = 5
) -> tuple[NativeInputs, list[Tensor]]:
    """The same for the given tensors."""
    columns, buffer = tensors[0].shape[1], np.empty(0, np.uint8)
    inputs = [NativeInput(dtype, raw(one)) for dtype, one in zip(dtypes, tensors, strict=True)]
    if files:
        inputs = [in_file(files / str(at), dtype, tensors[at]) for at, dtype in enumerate(dtypes)]
        buffer = np.empty(STEPS[len(dtypes)] * len(dtypes) * 4, np.uint8)
    return NativeInputs(inputs, columns, based, first, columns, buffer), [one.float() for one in tensors]


def alone(dtype: str, tensor: Tensor) -> NativeInputs:
    """One tensor in memory."""
    return NativeInputs([NativeInput(dtype, raw(tensor))], tensor.shape[1], False, 0, tensor.shape[1], raw(tensor)[:0])


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def in_file(path: Path, dtype: str, tensor: Tensor) -> NativeInput:
    """The tensor in a file, after some unrelated bytes."""
    path.write_bytes(b"header" + raw(tensor).tobytes())
    return NativeInput(dtype, os.open(path, os.O_RDONLY), 6)


def reduced(
    found: NativeInputs, reduction: Reduction, start: int, stop: int, dtype: str = "F32"
) -> tuple[Tensor, float]:
    """Rows of a reduction as they are written, and the largest magnitude."""
    out = torch.empty(stop - start, found.columns, dtype=torch_dtype(dtype))
    return out, found.reduce(reduction, start, stop, dtype, raw(out), np.zeros(5), 0)


def bits(one: Tensor) -> Tensor:
    """Bits, so that zeros of both signs differ."""
    return one.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_loads_every_16_bit_number(dtype: str) -> None:
    every = HALVES.view(torch_dtype(dtype)).view(1, -1)
    found = torch.from_numpy(alone(dtype, every).load_rows(0, 0, 1)).view(1, -1)
    expected = every.float()
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(bits(found[there]), bits(expected[there]))


@pytest.mark.parametrize("reduction", SUMS, ids=range(len(SUMS)))
@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
@pytest.mark.parametrize("in_files", [False, True])
def test_sums_equal_torch(tmp_path: Path, dtypes: list[str], reduction: Reduction, in_files: bool) -> None:
    """Compare rows 7 to 12 and the largest magnitude with torch, for task vectors and for models."""
    found, (*models, base) = stacked(dtypes, True, tmp_path if in_files else None)
    expected = reduction.evaluate([one[2:7] - base[2:7] for one in models], WHOLE).add_(base[2:7])
    rows, most = reduced(found, reduction, 7, 12)
    assert torch.equal(bits(rows), bits(expected))
    assert most == float(expected.abs().max())
    found, models = stacked(dtypes[1:], False, tmp_path if in_files else None)
    expected = reduction.evaluate([one[2:7].clone() for one in models], WHOLE)
    assert torch.equal(bits(reduced(found, reduction, 7, 12)[0]), bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounds_like_torch(dtype: str) -> None:
    """Random float32 numbers, and every 16-bit number with its neighbors and midpoints."""
    halves = HALVES.view(torch_dtype(dtype)).float()
    near = (halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 1 << 12, 1 << 15])).to(torch.int32)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(1))
    every = torch.cat([near.flatten(), any_bits.to(torch.int32)]).view(torch.float32).view(1, -1)
    rows, most = reduced(alone("F32", every), Reduction([1.0]), 0, 1, dtype)
    expected = every.to(torch_dtype(dtype))
    odd = every.isnan()
    assert torch.equal(rows.isnan(), odd)
    assert torch.equal(rows[~odd].view(torch.int16), expected[~odd].view(torch.int16))
    assert math.isnan(most)


def test_writes_the_same_nan_as_torch() -> None:
    odd = torch.tensor([[math.nan, -math.nan] * 32])
    for dtype in ("BF16", "F16"):
        rows, _ = reduced(alone("F32", odd), Reduction([1.0]), 0, 1, dtype)
        assert torch.equal(rows.view(torch.int16), odd.to(torch_dtype(dtype)).view(torch.int16))


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_change_stats_equal_torch(tmp_path: Path, dtype: str, in_files: bool) -> None:
    """Compare the sum over three of four rows, the last of which is not measured, with torch's measurement."""
    reduction = Reduction([3e-3, 0.0, 1e-3])
    found, (*models, base) = stacked(["BF16", "F32", "F16", "BF16"], True, tmp_path if in_files else None)
    after = reduction.evaluate([one[1:4] - base[1:4] for one in models], WHOLE).add_(base[1:4])
    expected = measure_change(TensorInfo("w", dtype, tuple(base.shape)), base[1:4], after)
    changes = np.zeros(5)
    for start, stop, measured in ((6, 8, 2), (8, 10, 1)):
        out = torch.empty(stop - start, found.columns, dtype=torch_dtype(dtype))
        found.reduce(reduction, start, stop, dtype, raw(out), changes, measured)
    assert changes.tolist() == pytest.approx(list(astuple(expected)[1:]), rel=1e-12)
    assert expected.lost_to_rounding > 0 or dtype == "F32"


def threshold(delta: Tensor, value: float, share: float) -> Threshold:
    """A threshold that keeps a share of the magnitudes equal to it."""
    ties = int(delta.abs().eq(value).sum())
    return Threshold(bits_of(value), int(share * ties), ties)


def ranges(deltas: list[Tensor]) -> list[MagnitudeRange | None]:
    """The largest; everything; between two thresholds; nothing."""
    return [
        MagnitudeRange(threshold(deltas[0], 0.5, 0.3)),
        None,
        MagnitudeRange(threshold(deltas[2], 0.25, 0.7), threshold(deltas[2], 1.5, 0.4)),
        MagnitudeRange(infinite_threshold()),
    ]


KEEPS = {
    "random": lambda deltas: KeepRandom([0.5, 0.3, 0.001, 1.0], WHOLE),  # upper, both, lower bytes; no mask
    "ranks": lambda deltas: KeepRanks([0.5, 0.3, 1.0, 0.6], [0.1, 0.2, 0.0, 0.3], WHOLE),
    "magnitudes": lambda deltas: KeepMagnitudes(ranges(deltas)),
    "variance": lambda deltas: KeepVarying(threshold(variance(deltas), 0.046875, 0.5)),
}


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("combine", [Combine.SUM, Combine.CONSENSUS_SUM, Combine.CONSENSUS_MEAN])
@pytest.mark.parametrize("kind", KEEPS)
def test_what_is_kept_equals_torch(tmp_path: Path, kind: str, combine: Combine, in_files: bool) -> None:
    """Magnitudes with many ties, of which the first are kept; two passes from the first row on; also their norms."""
    if kind == "variance" and combine == Combine.SUM:
        return
    tensors = [numbers("F32", seed).mul_(4).round_().mul_(0.25) for seed in range(5)]
    found, (*models, base) = placed(["F32"] * 5, tensors, True, tmp_path if in_files else None, first=0)
    keep = KEEPS[kind]([one - base for one in models])
    kept = [one - base for one in models]
    keep.drop(kept, WHOLE)
    weights = [0.5, -0.25, 1.0, 0.8]
    reduction = Reduction([1.0, 2.0, -0.3, 0.7], combine, keep, weights, scale=0.7, min_divisor=1e-6)
    expected = reduction.evaluate([one - base for one in models], WHOLE).add_(base)
    squares = [float(one.double().square().sum()) for one in kept]
    norms = [
        [float(part.abs().double().sum()) for part in (one - base, rest)]
        for one, rest in zip(models, kept, strict=True)
    ]
    for _ in range(2):
        rows = torch.cat([reduced(found, reduction, start, stop)[0] for start, stop in ((0, 2), (2, 3), (3, 9))])
        assert torch.equal(bits(rows), bits(expected))
        assert found.kept_squares(reduction, 0, 9) == pytest.approx(squares, rel=1e-12)
        if kind != "variance":
            assert found.l1_norms(reduction, 0, 9) == pytest.approx(np.array(norms), rel=1e-12)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("based", [True, False])
def test_counts_magnitudes(tmp_path: Path, based: bool, in_files: bool) -> None:
    """Compare with splitting each input alone; one input has two ranges, and one range is of the variance."""
    found, tensors = stacked(["BF16", "F32", "F16"], based, tmp_path if in_files else None)
    inputs = [one[1:7] - tensors[-1][1:7] for one in tensors[:-1]] if based else [one[1:7] for one in tensors]
    limits = [(VARIANCE, (0.05, 0.5)), (0, (0.1, 0.2)), (0, (1.0, 3.0)), (1, (0.0, 0.5))]
    searches = [(at, KthLargestSearch(1, 1, low=bits_of(low), high=bits_of(high))) for at, (low, high) in limits]
    for _, search in searches:
        search.start_scan()
    found.count_magnitudes(searches, 6, 12)
    for at, search in searches:
        values = variance(inputs) if at == VARIANCE else inputs[at]
        beyond, inside = split_magnitudes(magnitude_bits(values), search.low, search.high)
        assert search.counts is not None and search.candidates is not None
        others = inside[inside != search.guess - search.low]
        nonzero = int(values.count_nonzero()) * (at == VARIANCE)
        assert search.counts.tolist() == [len(others), beyond, len(inside) - len(others), nonzero]
        assert search.candidates[: len(others)].tolist() == others.tolist()


@pytest.mark.parametrize("count", [1, 63, 64, 1000, 4096])
def test_counts_magnitudes_of_any_content(count: int) -> None:
    """The number of magnitudes above a range of bits, and those inside, for ranges of any content."""
    every = numbers("F32", 3).flatten()[:count].contiguous().view(1, -1)
    every[0, : count // 5 : 2], every[0, count // 2] = math.nan, -math.inf
    bits = magnitude_bits(every)
    edges = sorted({0, *bits[:: max(count // 9, 1)].tolist(), (1 << 31) - 1})
    for low, high in pairwise(edges):
        search = KthLargestSearch(1, 1, low=low, high=high, guess=low)
        search.start_scan()
        alone("F32", every).count_magnitudes([(0, search)], 0, 1)
        above, inside = split_magnitudes(bits, low, high)
        assert search.counts is not None and search.candidates is not None
        others = inside[inside != search.guess - low]
        assert search.counts[:3].tolist() == [len(others), above, len(inside) - len(others)]
        assert search.candidates[: len(others)].tolist() == others.tolist()


def test_reports_the_input_whose_file_is_too_short(tmp_path: Path) -> None:
    found, _ = stacked(["BF16", "BF16"], False, tmp_path)
    os.truncate(tmp_path / "1", 1000)
    with pytest.raises(UnreadableInput) as raised:
        reduced(found, Reduction([0.5, 0.5]), 5, 14)
    assert raised.value.index == 1
    with pytest.raises(UnreadableInput) as raised:
        found.load_rows(1, 5, 14)
    assert raised.value.index == 1


def test_read_buffer_size() -> None:
    """At least one chunk, or row, of each input, however many there are."""
    assert read_buffer_nbytes(2) == 1 << 20
    assert read_buffer_nbytes(1000) == 1000 * CHUNK * 4
    assert read_buffer_nbytes(2, 1 << 20) == 8 << 20


@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
def test_load_rows_subtracts_the_base(dtypes: list[str]) -> None:
    """With a base: each input minus the base. Without: the inputs."""
    found, (*models, base) = stacked(dtypes, based=True)
    for at, expected in enumerate(one - base for one in models):
        assert found.load_rows(at, 5, 14).view(np.int32).tolist() == bits(expected).flatten().tolist()
    found, models = stacked(dtypes, based=False)
    for at, expected in enumerate(models):
        assert found.load_rows(at, 6, 8).view(np.int32).tolist() == bits(expected[1:3]).flatten().tolist()


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("based", [True, False])
def test_inner_products_equal_numpy(tmp_path: Path, based: bool, in_files: bool) -> None:
    """Compare with numpy in float64."""
    found, tensors = stacked(["BF16"] * 4, based, tmp_path if in_files else None)
    inputs = torch.stack([one - tensors[-1] for one in tensors[:-1]] if based else tensors)[:, 1:8].flatten(1).double()
    upper = np.triu_indices(len(inputs))
    np.testing.assert_allclose(found.inner_products(6, 13), (inputs @ inputs.T).numpy()[upper], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("models")
def test_torch_writes_the_same_file_without_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"merge_method": "linear", "models": ["./tuned-a", "./tuned-b"], "parameters": {"weight": [0.3, 0.8]}}
    out = mergeforge.merge(recipe, out="in-c", device="cpu")
    monkeypatch.setattr(bindings, "load_library", lambda: None)
    with pytest.raises(RuntimeError, match="the C library"):
        bindings.kernels()
    other = mergeforge.merge(recipe, out="in-torch", device="cpu")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
