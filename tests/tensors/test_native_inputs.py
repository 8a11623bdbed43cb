"""The C library on stored inputs, compared with torch on the same numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mergeforge
from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.execute.change_stats import measure_change
from mergeforge.methods import METHODS, Block
from mergeforge.methods._kth_largest import INFINITE_THRESHOLD
from mergeforge.methods._magnitude_range import MagnitudeRange, MagnitudeRanges
from mergeforge.methods._mask_cache import MaskCache
from mergeforge.methods._random_mask import apply_random_masks, mask_key
from mergeforge.methods._thresholds import Threshold, magnitude_bits, split_magnitudes, split_magnitudes_native
from mergeforge.methods._weighted_sum import WeightedSum, sign_consensus_sum, sign_consensus_terms, weighted_sum
from mergeforge.native import bindings
from mergeforge.native.bindings import CHUNK
from mergeforge.tensors.native_inputs import NativeInput, NativeInputs, UnreadableInput, read_buffer_nbytes

pytestmark = pytest.mark.needs_kernels

STEPS = {2: CHUNK, 3: CHUNK, 4: 2 * CHUNK, 5: CHUNK}  # number of inputs -> elements that are read at once
HALVES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
STORED = [["BF16"] * 4, ["F16"] * 4, ["F32"] * 4, ["BF16", "F32", "F16", "BF16"]]
SUMS = [
    WeightedSum([0.3, -1.7, 0.25]),
    WeightedSum([0.3, -1.7, 0.25], fused=True),
    WeightedSum([0.3, 1.1, 0.25], normalize=True, scale=0.7),
    WeightedSum([1.0, -1.0, 0.0], normalize=True, min_divisor=1e-8),
]


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
    columns = tensors[0].shape[1]
    inputs, buffer = [NativeInput(dtype, raw(one)) for dtype, one in zip(dtypes, tensors, strict=True)], None
    if files:
        inputs = [in_file(files / str(at), dtype, tensors[at]) for at, dtype in enumerate(dtypes)]
        buffer = np.empty(STEPS[len(dtypes)] * len(dtypes) * 4, np.uint8)
    return NativeInputs(inputs, columns, has_base=based, first_row=first, read_buffer=buffer), [
        one.float() for one in tensors
    ]


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def in_file(path: Path, dtype: str, tensor: Tensor) -> NativeInput:
    """The tensor in a file, after some unrelated bytes."""
    path.write_bytes(b"header" + raw(tensor).tobytes())
    return NativeInput(dtype, file=os.open(path, os.O_RDONLY), offset=6)


def summed(found: NativeInputs, terms: WeightedSum, start: int, stop: int, dtype: str = "F32") -> tuple[Tensor, float]:
    """Rows of a weighted sum as they are written, and the largest magnitude."""
    out = torch.empty(stop - start, found.columns, dtype=torch_dtype(dtype))
    return out, found.weighted_sum(terms, start, stop, dtype, raw(out))


def bits(one: Tensor) -> Tensor:
    """Bits, so that zeros of both signs differ."""
    return one.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_loads_every_16_bit_number(dtype: str) -> None:
    every = HALVES.view(torch_dtype(dtype)).view(1, -1)
    place = NativeInput(dtype, raw(every))
    found = NativeInputs([place], 1 << 16, has_base=False, first_row=0).load_rows(0, 0, 1, torch.empty(every.shape))
    expected = every.float()
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(bits(found[there]), bits(expected[there]))


@pytest.mark.parametrize("terms", SUMS, ids=range(len(SUMS)))
@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
@pytest.mark.parametrize("in_files", [False, True])
def test_weighted_sums_equal_torch(tmp_path: Path, dtypes: list[str], terms: WeightedSum, in_files: bool) -> None:
    """Compare rows 7 to 12 and the largest magnitude with torch, for task vectors and for models."""
    found, (*models, base) = stacked(dtypes, True, tmp_path if in_files else None)
    expected = terms.evaluate([one[2:7] - base[2:7] for one in models]).add_(base[2:7])
    rows, most = summed(found, terms, 7, 12)
    assert torch.equal(bits(rows), bits(expected))
    assert most == float(expected.abs().max())
    found, models = stacked(dtypes[1:], False, tmp_path if in_files else None)
    expected = terms.evaluate([one[2:7].clone() for one in models])
    assert torch.equal(bits(summed(found, terms, 7, 12)[0]), bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounds_like_torch(dtype: str) -> None:
    """Random float32 numbers, and every 16-bit number with its neighbors and midpoints."""
    halves = HALVES.view(torch_dtype(dtype)).float()
    near = (halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 1 << 12, 1 << 15])).to(torch.int32)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(1))
    every = torch.cat([near.flatten(), any_bits.to(torch.int32)]).view(torch.float32).view(1, -1)
    found = NativeInputs([NativeInput("F32", raw(every))], every.shape[1], has_base=False, first_row=0)
    rows, most = summed(found, WeightedSum([1.0]), 0, 1, dtype)
    expected = every.to(torch_dtype(dtype))
    odd = every.isnan()
    assert torch.equal(rows.isnan(), odd)
    assert torch.equal(rows[~odd].view(torch.int16), expected[~odd].view(torch.int16))
    assert math.isnan(most)


def test_writes_the_same_nan_as_torch() -> None:
    odd = torch.tensor([[math.nan, -math.nan] * 32])
    found = NativeInputs([NativeInput("F32", raw(odd))], 64, has_base=False, first_row=0)
    for dtype in ("BF16", "F16"):
        rows, _ = summed(found, WeightedSum([1.0]), 0, 1, dtype)
        assert torch.equal(rows.view(torch.int16), odd.to(torch_dtype(dtype)).view(torch.int16))


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_change_stats_equal_torch(tmp_path: Path, dtype: str, in_files: bool) -> None:
    """Compare the sum over two row ranges with torch's measurement of all rows."""
    terms = WeightedSum([3e-3, 0.0, 1e-3])
    found, (*models, base) = stacked(["BF16", "F32", "F16", "BF16"], True, tmp_path if in_files else None)
    after = terms.evaluate([one[1:4] - base[1:4] for one in models]).add_(base[1:4])
    expected = measure_change(TensorInfo("w", dtype, tuple(base.shape)), base[1:4], after)
    changes = np.zeros(5)
    for start, stop in ((6, 8), (8, 9)):
        out = torch.empty(stop - start, found.columns, dtype=torch_dtype(dtype))
        found.weighted_sum(terms, start, stop, dtype, raw(out), changes)
    assert changes.tolist() == pytest.approx(list(astuple(expected)[1:]), rel=1e-12)
    assert expected.lost_to_rounding > 0 or dtype == "F32"


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_random_masks_and_l1_norms_equal_torch(tmp_path: Path, fused: bool, in_files: bool) -> None:
    """Densities that need the upper byte, both bytes, the lower byte alone, and no mask."""
    densities = [0.5, 0.3, 0.001, 1.0]
    found, (*models, base) = stacked(["BF16", "F32", "F16", "BF16", "BF16"], True, tmp_path if in_files else None)
    block = Block("w", 6 * base.shape[1], seed=3)  # not a multiple of four
    left = apply_random_masks([one[1:8] - base[1:8] for one in models], block, densities, [MaskCache()] * 4)
    kept = [mask_key(Block("w", 0, seed=3), at, density) for at, density in enumerate(densities)]
    terms = WeightedSum([0.3, -1.7, 0.25, 1.0], scale=0.7, fused=fused, mask_keys=kept)
    norms = [
        [float(part.abs().double().sum()) for part in (one[1:8] - base[1:8], rest)]
        for one, rest in zip(models, left, strict=True)
    ]
    assert found.l1_norms(terms, 6, 13) == pytest.approx(np.array(norms), rel=1e-12)
    expected = replace(terms, mask_keys=()).evaluate(left).add_(base[1:8])
    assert torch.equal(bits(summed(found, terms, 6, 13)[0]), bits(expected))


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("densities", [[], [0.5, 1.0, 0.3, 0.001]])
def test_sign_consensus_of_stored_inputs_equals_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool, densities: list[float], in_files: bool
) -> None:
    """TIES from the inputs' bytes and in torch, with and without random masks."""
    weight, ratios = [0.5, -0.25, 1.0, 0.8], [1.5, 1.0, 2.25, 3.0]
    found, (*models, base) = stacked(["BF16", "F32", "F16", "BF16", "BF16"], True, tmp_path if in_files else None)
    deltas = [one[1:8] - base[1:8] for one in models]
    terms = sign_consensus_terms(weight, normalize, 0.7, ratios)
    if densities:
        deltas = apply_random_masks(deltas, Block("w", 6 * base.shape[1], 3), densities, [MaskCache()] * 4)
        terms = replace(terms, mask_keys=[mask_key(Block("w", 0, 3), at, one) for at, one in enumerate(densities)])
    in_c = summed(found, terms, 6, 13)[0]
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    in_torch = sign_consensus_sum(deltas, weight, normalize, 0.7, ratios).add_(base[1:8])
    assert torch.equal(bits(in_c), bits(in_torch))


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.3, 10.0])
def test_nearswap_equals_torch(t: float) -> None:
    found, (one, other) = stacked(["BF16", "F32"], based=False)
    one[0, 5] = other[0, 5]
    method = METHODS["nearswap"]
    expected = method([one[2:7].clone(), other[2:7].clone()], None, Block("w", 0, 0), {"t": t})
    terms = method.weighted_sum(None, 2, Block("w", 0, 0), "F32", {"t": t})
    assert torch.equal(bits(summed(found, terms, 7, 12)[0]), bits(expected))


@pytest.mark.parametrize("count", [1, 63, 64, 1000, 4096])
def test_split_magnitudes_equals_numpy(count: int) -> None:
    """The number of magnitudes above a range of bits, and those inside, for ranges of any content."""
    every = numbers("F32", 3).flatten()[:count].contiguous()
    every[: count // 5 : 2], every[count // 2] = math.nan, -math.inf
    bits = magnitude_bits(every)
    edges = sorted({0, *bits[:: max(count // 9, 1)].tolist(), (1 << 31) - 1})
    for low, high in pairwise(edges):
        beyond, inside = split_magnitudes_native(every, low, high)
        expected = split_magnitudes(bits, low, high)
        assert beyond == expected[0]
        assert inside.tolist() == expected[1].tolist()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lambda_", [1.0, 0.7])
@pytest.mark.parametrize("ratios", [None, [1.5, 1.0, 2.25]])
def test_sign_consensus_sum_equals_torch(
    monkeypatch: pytest.MonkeyPatch, normalize: bool, lambda_: float, ratios: list[float] | None
) -> None:
    """Weights of both signs; zeros, infinities and NaN."""
    deltas = [numbers("F32", seed) for seed in range(3)]
    deltas[0][0, :3], deltas[1][1, :3], deltas[2][2, :3] = math.inf, -math.inf, math.nan
    weight = [0.5, -0.25, 1.0]
    in_c = sign_consensus_sum([one.clone() for one in deltas], weight, normalize, lambda_, ratios)
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    in_torch = sign_consensus_sum([one.clone() for one in deltas], weight, normalize, lambda_, ratios)
    odd = in_torch.isnan()
    assert torch.equal(in_c.isnan(), odd)
    assert torch.equal(bits(in_c[~odd]), bits(in_torch[~odd]))


def threshold(delta: Tensor, value: float, share: float) -> Threshold:
    """A threshold that keeps a share of the magnitudes equal to it."""
    ties = int(delta.abs().eq(value).sum())
    return Threshold(bits_of(value), int(share * ties), ties)


def largest(delta: Tensor) -> MagnitudeRange:
    return MagnitudeRange(threshold(delta, 0.5, 0.3))


def all_ties(delta: Tensor) -> MagnitudeRange:
    return MagnitudeRange(threshold(delta, 0.25, 1.0))


def no_ties(delta: Tensor) -> MagnitudeRange:
    return MagnitudeRange(threshold(delta, 1.0, 0.0))


def between(delta: Tensor) -> MagnitudeRange:
    return MagnitudeRange(threshold(delta, 0.25, 0.7), threshold(delta, 1.5, 0.4))


def nothing(delta: Tensor) -> MagnitudeRange:
    return MagnitudeRange(Threshold(*INFINITE_THRESHOLD))


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("elects", [False, True])
@pytest.mark.parametrize("makers", [(largest, all_ties, between, None), (no_ties, between, nothing, largest)])
def test_magnitude_ranges_equal_torch(
    tmp_path: Path, makers: tuple[Callable[[Tensor], MagnitudeRange] | None, ...], elects: bool, in_files: bool
) -> None:
    """Magnitudes with many ties, of which the first are kept; two passes from the first row on; also L1 norms."""
    tensors = [numbers("F32", seed).mul_(4).round_().mul_(0.25) for seed in range(5)]
    found, (*models, base) = placed(["F32"] * 5, tensors, True, tmp_path if in_files else None, first=0)
    deltas = [one - base for one in models]
    ranges = [make and make(delta) for make, delta in zip(makers, deltas, strict=True)]
    kept = MagnitudeRanges(ranges).keep([one.clone() for one in deltas], Block("w", 0, 0))
    norms = [[float(part.abs().double().sum()) for part in pair] for pair in zip(deltas, kept, strict=True)]
    weight = [0.5, -0.25, 1.0, 0.8]
    terms = WeightedSum(
        weight,
        scale=0.7,
        election_weights=weight if elects else (),
        magnitude_ranges=MagnitudeRanges(ranges).native_table,
    )
    with_torch = sign_consensus_sum if elects else weighted_sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "is_available", lambda: False)
        expected = with_torch([one.clone() for one in kept], weight, False, 0.7).add_(base)
    for _ in range(2):
        rows = torch.cat([summed(found, terms, start, stop)[0] for start, stop in ((0, 2), (2, 3), (3, 9))])
        assert torch.equal(bits(rows), bits(expected))
        assert found.l1_norms(terms, 0, 9) == pytest.approx(np.array(norms), rel=1e-12)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("based", [True, False])
def test_split_magnitudes_of_inputs(tmp_path: Path, based: bool, in_files: bool) -> None:
    """Compare with splitting each input alone; one input has two ranges."""
    found, tensors = stacked(["BF16", "F32", "F16"], based, tmp_path if in_files else None)
    inputs = [one - tensors[-1] for one in tensors[:-1]] if based else tensors
    ranges = [(at, *map(bits_of, pair)) for at, pair in ((0, (0.1, 0.2)), (0, (1.0, 3.0)), (1, (0.0, 0.5)))]
    for (at, low, high), (beyond, inside) in zip(ranges, found.split_magnitudes(ranges, 6, 12), strict=True):
        expected = split_magnitudes(magnitude_bits(inputs[at][1:7]), low, high)
        assert beyond == expected[0]
        assert inside.tolist() == expected[1].tolist()


def test_reports_the_input_whose_file_is_too_short(tmp_path: Path) -> None:
    found, _ = stacked(["BF16", "BF16"], False, tmp_path)
    os.truncate(tmp_path / "1", 1000)
    with pytest.raises(UnreadableInput) as raised:
        summed(found, WeightedSum([0.5, 0.5]), 5, 14)
    assert raised.value.index == 1


def test_read_buffer_size() -> None:
    """At least one chunk of each input, however many there are."""
    assert read_buffer_nbytes(2) == 1 << 20
    assert read_buffer_nbytes(1000) == 1000 * CHUNK * 4


@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
def test_load_rows_subtracts_the_base(dtypes: list[str]) -> None:
    """With a base: each input minus the base, and the base itself. Without: the inputs."""
    found, (*models, base) = stacked(dtypes, based=True)
    for at, expected in enumerate([*(one - base for one in models), base]):
        assert torch.equal(bits(found.load_rows(at, 5, 14, torch.empty_like(base))), bits(expected))
    found, models = stacked(dtypes, based=False)
    for at, expected in enumerate(models):
        assert torch.equal(bits(found.load_rows(at, 6, 8, torch.empty(2, base.shape[1]))), bits(expected[1:3]))


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
    with pytest.raises(RuntimeError, match="not compiled"):
        bindings.kernels()
    other = mergeforge.merge(recipe, out="in-torch", device="cpu")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_ignores_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library for another system, or compiled from another kernels.c."""
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "native.py"))
    assert bindings.load_library.__wrapped__() is None
    library = tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"\x7fELF")
    assert bindings.load_library.__wrapped__() is None
    compiled = Path(bindings.kernels()._name)
    library.unlink()
    library.write_bytes(compiled.read_bytes())
    assert bindings.load_library.__wrapped__() is not None  # no source next to it: a wheel
    (tmp_path / "kernels.c").write_text("another one")
    assert bindings.load_library.__wrapped__() is None


def test_refuses_the_wrong_number_of_factors() -> None:
    found, _ = stacked(["BF16"] * 3, based=True)
    with pytest.raises(AssertionError, match=r"\[3, 0, 0, 0\] for 2 inputs"):
        summed(found, WeightedSum([1.0, 1.0, 1.0]), 5, 6)
    with pytest.raises(AssertionError, match=r"\[2, 0, 0, 1\] for 2 inputs"):
        summed(found, WeightedSum([1.0, 1.0], election_weights=[1.0]), 5, 6)
    with pytest.raises(AssertionError, match=r"\[2, 0, 1, 0\] for 2 inputs"):
        summed(found, WeightedSum([1.0, 1.0], magnitude_ranges=MagnitudeRanges([None]).native_table), 5, 6)
