"""Kernels that read stored inputs, against torch on the same numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeforge import compiled, planning
from mergeforge.methods.consensus import WeightedSum
from mergeforge.sources import fused
from mergeforge.sources.fused import CHUNK, KINDS, Stack, stack
from mergeforge.tensors import torch_dtype

pytestmark = pytest.mark.skipif(not compiled.available(), reason="numba is not installed")

HALVES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
STORED = [["BF16"] * 4, ["F16"] * 4, ["F32"] * 4, ["BF16", "F32", "F16", "BF16"]]
SCALED = "merge_method: passthrough\nparameters: {scale: 0.5}\nmodels: [./tuned-a]"
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
    every = HALVES.view(torch_dtype(dtype))
    out = np.empty(1 << 16, np.float32)
    fused.widen(every.data_ptr(), KINDS[dtype], 0, out)
    expected = every.float()
    found = torch.from_numpy(out)
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(bits(found[there]), bits(expected[there]))


@pytest.mark.parametrize("terms", SUMS, ids=range(len(SUMS)))
@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
def test_weighted_sums(dtypes: list[str], terms: WeightedSum) -> None:
    """Rows 7 to 12, bit for bit, of task vectors and of models."""
    found, (*models, base) = stacked(dtypes, based=True)
    expected = terms.of([one[2:7] - base[2:7] for one in models]).add_(base[2:7])
    assert torch.equal(bits(found.weighted(terms, 7, 12, torch.empty(5, base.shape[1]))), bits(expected))
    found, models = stacked(dtypes[1:], based=False)
    expected = terms.of([one[2:7].clone() for one in models])
    assert torch.equal(bits(found.weighted(terms, 7, 12, torch.empty(5, base.shape[1]))), bits(expected))


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
@pytest.mark.parametrize("recipe", [SCALED, "base_model: ./base\nadapters: [./adapters/loan]"])
def test_what_kernels_do_not_speed_up_starts_no_numba(recipe: str) -> None:
    """A model alone, and adapters: numba takes 100 MB and 0.4 s."""
    code = "import sys, mergeforge, mergeforge.planning as planning\nplanning.KERNELS_FROM = 1\n"
    code += f"mergeforge.merge(__import__('yaml').safe_load({recipe + chr(10) + 'dtype: float16'!r}), out='out')\n"
    code += "assert 'torch' in sys.modules and 'numba' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_numba_there_are_no_kernels(models: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergeforge

    monkeypatch.setattr(planning, "KERNELS_FROM", 1)
    recipe = {"merge_method": "linear", "models": ["./tuned-a", "./tuned-b"], "parameters": {"weight": 1}}
    assert mergeforge.plan(recipe, out="out", device="cpu").kernels
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert not mergeforge.plan(recipe, out="out", device="cpu").kernels
