"""Every method that is a reduction, by both interpreters: statistics and merge in C and in torch, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.method_blocks import of_scan
from torch import Tensor

from mergeforge.core.tensor_info import torch_dtype
from mergeforge.methods import METHODS, Block, Reduction
from mergeforge.native import bindings
from mergeforge.tensors.native_inputs import NativeInput, NativeInputs
from mergeforge.tensors.native_statistics import NativeStatistics

pytestmark = pytest.mark.needs_kernels

PARAMETERS: dict[str, Any] = {"weight": [0.3, -0.7, 1.1], "density": [0.5, 1.0, 0.3], "epsilon": [0.1, 0.1, 0.0999]}
PARAMETERS |= {"gamma": [0.01, 0.2, 0.1], "scale": [0.9, 0.9, 0.9], "t": 0.3, "select_topk": 0.4, "lambda": 0.7}
REDUCTIONS = [
    name
    for name in METHODS
    if METHODS[name].is_reduction({p.name: p.default for p in METHODS[name].parameters.values()})
]
VARIANTS = [{}, {"rescale": True}, {"rescale": False, "normalize": True}, {"normalize": False, "lambda": 1.0}]
CASES = [
    (name, variant) for name in REDUCTIONS for variant in VARIANTS if variant.keys() <= METHODS[name].parameters.keys()
]
SHAPES = [(1, 1), (1, 3), (40, 7), (5, 600), (3, 2048), (2, 5633), (1, 20_001), (20_001,)]
DTYPES = [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32")]  # of models, and of the base


def parameters(name: str, count: int, variant: dict[str, Any]) -> dict[str, Any]:
    """Different values for every input where a method takes one for each."""
    values = {}
    for one in METHODS[name].parameters.values():
        value = (PARAMETERS | variant).get(one.name, one.default)
        values[one.name] = value[:count] if isinstance(value, list) else [value] * count if one.per_input else value
    return values


def tensors(shape: tuple[int, ...], dtypes: tuple[str, str], seed: int) -> tuple[list[Tensor], Tensor]:
    """Three models near a base: many equal and zero differences, zeros of both signs, one scale for each row."""
    numbers = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=numbers).mul_(0.02)
    base.view(-1)[::9], base.view(-1)[1::9] = 0.0, -0.0
    models = [base + torch.randn(shape, generator=numbers) * 10.0 ** -(3 + index) for index in range(3)]
    models[2].view(-1)[::3] = models[0].view(-1)[::3]
    model_dtype, base_dtype = map(torch_dtype, dtypes)
    assert model_dtype and base_dtype
    return [model.to(model_dtype) for model in models], base.to(base_dtype)


def raw(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


class Both:
    """One merge by both interpreters. `block_rows`: rows of a block."""

    def __init__(self, name: str, variant: dict[str, Any], shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
        self.method = METHODS[name]
        models, base = tensors(shape, dtypes, seed=len(name))
        count = min(3, self.method.inputs[1])
        inputs = [base.to(models[0].dtype), *models[: count - 1]] if self.method.base_is_input else models[:count]
        self.is_vector = len(shape) == 1
        self.rows, self.columns = (shape[0], 1) if self.is_vector else shape
        self.block_rows = 4096 if self.is_vector else max(1, 8000 // self.columns)
        self.inputs = [values.reshape(self.rows, self.columns) for values in inputs]
        self.base = base.reshape(self.rows, self.columns) if self.method.on_deltas else None
        self.dtypes = [dtypes[0]] * len(inputs) + ([dtypes[1]] if self.base is not None else [])
        self.parameters = parameters(name, len(inputs), variant)

    def blocks(self) -> list[tuple[int, int]]:
        return list(pairwise([*range(0, self.rows, self.block_rows), self.rows]))

    def block(self, start: int) -> Block:
        return Block("w", start * self.columns, 5, self.is_vector)

    def values(self, start: int, stop: int) -> list[Tensor]:
        values = [tensor[start:stop].float().clone() for tensor in self.inputs]  # methods overwrite them
        return values if self.base is None else [value - self.base[start:stop].float() for value in values]

    def in_torch(self) -> tuple[Any, Tensor]:
        def scan(visit: Any, sample: int = 0) -> Iterator[Any]:
            return (visit(self.values(start, stop), self.block(start)) for start, stop in self.blocks())

        known = of_scan(scan, self.rows * self.columns, len(self.inputs), self.block(0))
        prepared = self.method.prepare(known, self.parameters)
        merged = []
        for start, stop in self.blocks():
            block = self.method.merge_block(self.values(start, stop), prepared, self.block(start), self.parameters)
            merged.append(block if self.base is None else block + self.base[start:stop].float())
        return prepared, torch.cat(merged)

    def in_c(self) -> tuple[Any, Tensor]:
        row_length = self.block_rows if self.is_vector else self.columns
        stored = [*self.inputs, *([] if self.base is None else [self.base])]
        tensors = [NativeInput(dtype, raw(tensor)) for dtype, tensor in zip(self.dtypes, stored, strict=True)]
        empty = np.empty(0, np.uint8)
        inputs = NativeInputs(tensors, self.columns, self.base is not None, 0, row_length, empty)

        def scan(spans: Any) -> Iterator[tuple[NativeInputs, int, int]]:
            return ((inputs, *span) for span in spans or self.blocks())

        known = NativeStatistics(self.rows * self.columns, len(self.inputs), self.block(0), scan, [(0, self.rows)])
        prepared = self.method.prepare(known, self.parameters)
        assert isinstance(prepared, Reduction)
        merged = torch.empty(self.rows, self.columns)
        for start, stop in self.blocks():
            inputs.reduce(prepared, start, stop, "F32", raw(merged[start:stop]), np.zeros(5), 0)
        return prepared, merged


def test_every_method_that_adds_up_inputs_is_a_reduction() -> None:
    assert set(METHODS) - set(REDUCTIONS) == {"ram", "ramplus_tl", "arcee_fusion"}


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_both_interpreters_give_the_same_bytes(name: str, variant: dict[str, Any], dtypes: tuple[str, str]) -> None:
    for shape in SHAPES:
        both = Both(name, variant, shape, dtypes)
        (from_torch, expected), (from_c, merged) = both.in_torch(), both.in_c()
        np.testing.assert_allclose(from_c.factors, from_torch.factors, rtol=1e-12, err_msg=str(shape))
        assert torch.equal(merged.view(torch.int32), expected.view(torch.int32)), shape


@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_vector_width_gives_the_same_bytes(name: str) -> None:
    library = bindings.kernels()
    widest = library.vector_width()
    try:
        merged = {}
        for width in range(widest + 1):
            assert library.vector_width(width) == width
            merged[width] = [Both(name, {}, shape, ("BF16", "BF16")).in_c()[1] for shape in SHAPES]
    finally:
        library.vector_width(widest)
    for others in merged.values():
        assert all(
            torch.equal(one.view(torch.int32), two.view(torch.int32))
            for one, two in zip(others, merged[0], strict=True)
        )


def many(rows: Tensor) -> Tensor:
    """Continuous: nearly no two are equal."""
    return rows


def halves(rows: Tensor) -> Tensor:
    """Many of one magnitude, some a little above."""
    rows[:, ::2] = -1.0
    rows[:, 1::16] = 1.0 + rows[:, 1::16].abs() * 1e-6
    return rows


def crowded(rows: Tensor) -> Tensor:
    """Most magnitudes differ less than their buckets do, beside a few that are far away."""
    rows = 1 + rows.abs() * 1e-4
    rows[:, : rows.shape[1] // 40] *= 1e6
    return rows


def nothing(rows: Tensor) -> Tensor:
    """Zeros of both signs, and infinities."""
    rows.zero_()[:, ::3] = -0.0
    rows[-1:, -1:] = -math.inf
    return rows


@pytest.mark.parametrize("density", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (3, 2), (40, 7), (8, 600), (3, 4096), (1, 100_001)])
@pytest.mark.parametrize("made", [many, halves, crowded, nothing])
def test_ranks_equal_a_stable_sort(made: Any, shape: tuple[int, int], density: float) -> None:
    """The mask of della_linear for rows that are hard to rank."""
    both = Both("della_linear", {}, shape, ("F32", "F32"))
    both.base, both.dtypes = None, ["F32"]
    both.inputs = [made(torch.randn(shape, generator=torch.Generator().manual_seed(1)))]
    both.parameters |= {"weight": [1.0], "density": [density], "epsilon": [0.0999], "rescale": False}
    expected, merged = both.in_torch()[1], both.in_c()[1]
    is_nan = expected.isnan()  # an infinity that is dropped
    assert torch.equal(merged.isnan(), is_nan)
    assert torch.equal(merged[~is_nan], expected[~is_nan])
