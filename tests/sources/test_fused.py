"""Kernels in C that read stored inputs, against torch on the same numbers."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mergeforge
from mergeforge import native
from mergeforge.methods.consensus import WeightedSum
from mergeforge.native import CHUNK
from mergeforge.sources.fused import Stack, stack
from mergeforge.tensors import torch_dtype

pytestmark = pytest.mark.skipif(not native.available(), reason="kernels.c is not compiled")

HALVES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
STORED = [["BF16"] * 4, ["F16"] * 4, ["F32"] * 4, ["BF16", "F32", "F16", "BF16"]]
SUMS = [
    WeightedSum([0.3, -1.7, 0.25]),
    WeightedSum([0.3, -1.7, 0.25], fused=True),
    WeightedSum([0.3, 1.1, 0.25], normalize=True, scale=0.7),
    WeightedSum([1.0, -1.0, 0.0], normalize=True, least=1e-8),
]


def numbers(dtype: str, seed: int, rows: int = 9, columns: int = CHUNK // 3) -> Tensor:
    """Of many magnitudes, with zeros of both signs."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made[:, ::7], made[:, 1::7] = 0.0, -0.0
    made[:, 2::7] *= 1e-6
    return made.to(torch_dtype(dtype))


def stacked(dtypes: list[str], based: bool) -> tuple[Stack, list[Tensor]]:
    """A stack whose first row is number 5, and its tensors as float32."""
    tensors = [numbers(dtype, seed) for seed, dtype in enumerate(dtypes)]
    return stack(tensors, dtypes, based=based, first=5), [one.float() for one in tensors]


def bits(one: Tensor) -> Tensor:
    """So that zeros of both signs differ."""
    return one.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits(dtype: str) -> None:
    every = HALVES.view(torch_dtype(dtype)).view(1, -1)
    found = stack([every], [dtype], based=False, first=0).rows(0, 0, 1, torch.empty(every.shape))
    expected = every.float()
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(bits(found[there]), bits(expected[there]))


@pytest.mark.parametrize("terms", SUMS, ids=range(len(SUMS)))
@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
def test_weighted_sums(dtypes: list[str], terms: WeightedSum) -> None:
    """Rows 7 to 12, bit for bit, of task vectors and of models."""
    found, (*models, base) = stacked(dtypes, based=True)
    expected = terms.of([one[2:7] - base[2:7] for one in models]).add_(base[2:7])
    assert torch.equal(bits(found.weighted(terms)(7, torch.empty(5, base.shape[1]))), bits(expected))
    found, models = stacked(dtypes[1:], based=False)
    expected = terms.of([one[2:7].clone() for one in models])
    assert torch.equal(bits(found.weighted(terms)(7, torch.empty(5, base.shape[1]))), bits(expected))


@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
def test_rows(dtypes: list[str]) -> None:
    """Each input less the base, the base as it is; and all as they are."""
    found, (*models, base) = stacked(dtypes, based=True)
    for at, expected in enumerate([*(one - base for one in models), base]):
        assert torch.equal(bits(found.rows(at, 5, 14, torch.empty_like(base))), bits(expected))
    found, models = stacked(dtypes, based=False)
    for at, expected in enumerate(models):
        assert torch.equal(bits(found.rows(at, 6, 8, torch.empty(2, base.shape[1]))), bits(expected[1:3]))


@pytest.mark.parametrize("based", [True, False])
def test_inner_products(based: bool) -> None:
    """Against numpy in float64."""
    found, tensors = stacked(["BF16"] * 4, based)
    inputs = torch.stack([one - tensors[-1] for one in tensors[:-1]] if based else tensors)[:, 1:8].flatten(1).double()
    upper = np.triu_indices(len(inputs))
    np.testing.assert_allclose(found.products(6, 13), (inputs @ inputs.T).numpy()[upper], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("models")
def test_without_a_compiler_torch_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file."""
    recipe = {"merge_method": "linear", "models": ["./tuned-a", "./tuned-b"], "parameters": {"weight": [0.3, 0.8]}}
    out = mergeforge.merge(recipe, out="in-c", device="cpu")
    monkeypatch.setattr(native, "_library", lambda: None)
    with pytest.raises(RuntimeError, match="not compiled"):
        native.kernels()
    other = mergeforge.merge(recipe, out="in-torch", device="cpu")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_library_that_does_not_load_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another system, or compiled from another kernels.c."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._library.__wrapped__() is None
    library = tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"\x7fELF")
    assert native._library.__wrapped__() is None
    compiled = Path(native.kernels()._name)
    library.unlink()
    library.write_bytes(compiled.read_bytes())
    assert native._library.__wrapped__() is not None  # no source beside: a wheel
    (tmp_path / "kernels.c").write_text("another one")
    assert native._library.__wrapped__() is None


def test_as_many_factors_as_inputs() -> None:
    found, _ = stacked(["BF16"] * 3, based=True)
    with pytest.raises(AssertionError, match="3 factors for 2 inputs"):
        found.weighted(WeightedSum([1.0, 1.0, 1.0]))(5, torch.empty(1, found.tensors[0].shape[1]))
