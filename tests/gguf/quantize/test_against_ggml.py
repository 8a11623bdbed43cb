"""mergeforge.gguf.quantize against ggml_quantize_chunk(): the same bytes, for both back ends."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from support.ggml_reference import quantized
from support.quantize_cases import CASES, importances

from mergeforge.gguf import quantize
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, encode

KINDS = [kind for kind in QUANT_TYPES.values() if kind.block > 1]
names = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
BACKENDS = ["torch", *(["numba"] if quantize.backend("cpu") == "numba" else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)


def encoded(backend: str, kind: QuantType, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    out = torch.empty((len(rows), kind.row_nbytes(rows.shape[1])), dtype=torch.uint8)
    weights = None if importance is None else torch.from_numpy(importance)
    fill = quantize._fill if backend == "torch" else quantize._fill_compiled
    fill(kind, torch.from_numpy(rows), weights, out)
    return out.numpy()


def compare(backend: str, kind: QuantType, rows: int, columns: int, kinds_of_importance: set[str]) -> None:
    for name, case in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = np.ascontiguousarray(case(rng, rows, columns))
        before = x.copy()
        for weights, importance in {"none": None, **importances(rng, columns)}.items():
            if weights in kinds_of_importance:
                found = encoded(backend, kind, x, importance)
                np.testing.assert_array_equal(
                    found, quantized(kind, x, importance), f"{kind.name}, {name}, importance {weights}"
                )
        np.testing.assert_array_equal(x.view(np.uint32), before.view(np.uint32))


@names
@backends
def test_same_bytes(kind: QuantType, backend: str) -> None:
    """20 kinds of rows, without and with an imatrix (one with zeros), 4 x 512."""
    compare(backend, kind, 4, 512, {"none", "holes"})


@pytest.mark.slow
@names
@backends
def test_same_bytes_of_many_rows(kind: QuantType, backend: str) -> None:
    """The same kinds, 40 x 768, with all kinds of imatrix: ones, zeros, a wide range."""
    compare(backend, kind, 40, 768, {"none", "ones", "gauss", "holes", "heavy", "zeros"})


@names
@backends
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 1280), (130, 256), (2, 4096), (1, 11008)])
def test_same_bytes_in_any_shape(kind: QuantType, backend: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    importance = rng.random(columns).astype(np.float32)
    for weights in (None, importance):
        np.testing.assert_array_equal(encoded(backend, kind, x, weights), quantized(kind, x, weights))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.block == 32], ids=lambda kind: kind.name)
@backends
def test_same_bytes_of_rows_that_are_no_multiple_of_256(kind: QuantType, backend: str) -> None:
    rng = np.random.default_rng(5)
    x, importance = rng.standard_normal((5, 96)).astype(np.float32), rng.random(96).astype(np.float32)
    for weights in (None, importance):
        np.testing.assert_array_equal(encoded(backend, kind, x, weights), quantized(kind, x, weights))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_same_bytes_without_blocks(name: str) -> None:
    """Every kind of rows, rounded to half precision or bfloat16."""
    for case in CASES.values():
        x = np.ascontiguousarray(case(np.random.default_rng(1), 3, 64))
        np.testing.assert_array_equal(
            encode(QUANT_TYPES[name], torch.from_numpy(x)).numpy(), quantized(QUANT_TYPES[name], x)
        )


@pytest.mark.gpu
@names
def test_same_bytes_on_cuda(kind: QuantType) -> None:
    """The torch back end on a GPU, all kinds of rows."""
    for name, case in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = np.ascontiguousarray(case(rng, 8, 768))
        for importance in (None, importances(rng, 768)["holes"]):
            weights = None if importance is None else torch.from_numpy(importance).cuda()
            found = encode(kind, torch.from_numpy(x).cuda(), weights).cpu().numpy()
            np.testing.assert_array_equal(found, quantized(kind, x, importance), f"{kind.name}, {name}")
