"""mergeforge.gguf.quantize against ggml_quantize_chunk(): the same bytes from both backends."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from support.ggml_reference import ggml_quantize
from support.quantize_cases import CASES, importances

from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, encode

BLOCK_TYPES = [quant_type for quant_type in QUANT_TYPES.values() if quant_type.block > 1]
# ggml prepares the grids of IQ1 to IQ3 for up to half a minute; test_grid_types.py compares with recorded digests
PARAMETERS = [
    pytest.param(quant_type, id=quant_type.name, marks=() if quant_type.quantize_torch else pytest.mark.slow)
    for quant_type in BLOCK_TYPES
]
names = pytest.mark.parametrize("quant_type", PARAMETERS)
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.needs_kernels)])


@pytest.fixture(autouse=True)
def _skip_types_that_torch_does_not_encode(request: pytest.FixtureRequest) -> None:
    arguments = getattr(request.node, "callspec", None)
    quant_type = arguments.params.get("quant_type") if arguments else None
    if quant_type and quant_type.quantize_torch is None and arguments and arguments.params.get("backend") == "torch":
        pytest.skip(f"only the C library encodes {quant_type.name}")


def weights_for(quant_type: QuantType, importance: np.ndarray) -> list[np.ndarray | None]:
    """With importance, and without it if the type can do without."""
    return [importance] if quant_type.needs_importance else [None, importance]


def encoded(backend: str, quant_type: QuantType, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    weights = None if importance is None else torch.from_numpy(importance)
    return encode(quant_type, torch.from_numpy(rows), weights, backend=backend).numpy()


def compare(
    backend: str, quant_type: QuantType, rows: int, columns: int, importance_names: set[str], seed: int = 0
) -> None:
    for name, make_rows in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
        x = np.ascontiguousarray(make_rows(rng, rows, columns))
        before = x.copy()
        for importance_name, importance in {"none": None, **importances(rng, columns)}.items():
            if importance_name in importance_names and not (importance is None and quant_type.needs_importance):
                ours, theirs = encoded(backend, quant_type, x, importance), ggml_quantize(quant_type, x, importance)
                np.testing.assert_array_equal(ours, theirs, f"{quant_type.name}, {name}, importance {importance_name}")
        np.testing.assert_array_equal(x.view(np.uint32), before.view(np.uint32))


@names
@backends
def test_same_bytes(quant_type: QuantType, backend: str) -> None:
    """20 kinds of rows of 4 x 512, without an imatrix and with one that has zeros."""
    compare(backend, quant_type, 4, 512, {"none", "holes"})


@pytest.mark.slow
@names
@backends
def test_same_bytes_for_many_rows(quant_type: QuantType, backend: str) -> None:
    """The same kinds of rows, with every kind of imatrix: ones, zeros, a wide range; 500 cases or more."""
    for seed, (rows, columns) in enumerate([(40, 768), (3, 256), (7, 1280), (1, 512), (5, 1024)]):
        compare(backend, quant_type, rows, columns, {"none", "ones", "gauss", "holes", "heavy", "zeros"}, seed)


@names
@backends
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 1280), (130, 256), (2, 4096), (1, 11008)])
def test_same_bytes_for_any_shape(quant_type: QuantType, backend: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    importance = rng.random(columns).astype(np.float32)
    for weights in weights_for(quant_type, importance):
        np.testing.assert_array_equal(encoded(backend, quant_type, x, weights), ggml_quantize(quant_type, x, weights))


@pytest.mark.parametrize(
    "quant_type",
    [quant_type for quant_type in BLOCK_TYPES if quant_type.block == 32],
    ids=lambda quant_type: quant_type.name,
)
@backends
def test_same_bytes_for_columns_that_are_not_a_multiple_of_256(quant_type: QuantType, backend: str) -> None:
    rng = np.random.default_rng(5)
    x, importance = rng.standard_normal((5, 96)).astype(np.float32), rng.random(96).astype(np.float32)
    for weights in (None, importance):
        np.testing.assert_array_equal(encoded(backend, quant_type, x, weights), ggml_quantize(quant_type, x, weights))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_same_bytes_for_types_without_blocks(name: str) -> None:
    """Every kind of rows in float32, half precision and bfloat16."""
    for make_rows in CASES.values():
        x = np.ascontiguousarray(make_rows(np.random.default_rng(1), 3, 64))
        np.testing.assert_array_equal(
            encode(QUANT_TYPES[name], torch.from_numpy(x)).numpy(), ggml_quantize(QUANT_TYPES[name], x)
        )


@pytest.mark.gpu
@names
def test_same_bytes_on_cuda(quant_type: QuantType) -> None:
    """The torch backend on a GPU, every kind of rows."""
    for name, make_rows in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = np.ascontiguousarray(make_rows(rng, 8, 768))
        for importance in weights_for(quant_type, importances(rng, 768)["holes"]):
            weights = None if importance is None else torch.from_numpy(importance).cuda()
            ours = encode(quant_type, torch.from_numpy(x).cuda(), weights).cpu().numpy()
            np.testing.assert_array_equal(ours, ggml_quantize(quant_type, x, importance), f"{quant_type.name}, {name}")
