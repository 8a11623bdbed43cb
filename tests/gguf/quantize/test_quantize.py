"""mergeforge.gguf.quantize without a reference at hand: errors as expected, any cut the same bytes, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mergeforge.gguf import quantize
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, encode, iq4, numba_kernel
from mergeforge.gguf.quantize.ggml_rounding import half_bits, half_value

BLOCKS = [kind for kind in QUANT_TYPES.values() if kind.block > 1]
kinds = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
needs_numba = pytest.mark.skipif(not numba_kernel.available(), reason="numba is not installed")
# Relative error in percent of normally distributed weights, measured with llama.cpp's own quantiser.
ERRORS = {"Q8_0": 0.54, "Q6_K": 1.77, "Q5_K": 3.61, "Q5_1": 3.78, "Q5_0": 4.27, "Q4_K": 7.13, "IQ4_NL": 7.61}
ERRORS |= {"IQ4_XS": 7.67, "Q4_1": 7.82, "Q4_0": 8.59, "Q3_K": 15.1, "Q2_K": 29.6}


def gauss(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def in_torch(kind: QuantType, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty((len(rows), kind.row_nbytes(rows.shape[1])), dtype=torch.uint8)
    quantize._fill(kind, rows, importance, out)
    return out


def test_types_are_gguf_s() -> None:
    """Numbers, blocks and sizes against the gguf package's table."""
    for kind in QUANT_TYPES.values():
        assert (kind.block, kind.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType(kind.number)]
        assert GGMLQuantizationType(kind.number).name == kind.name


@kinds
def test_error_is_as_expected(kind: QuantType) -> None:
    """The relative error of 512 x 512 normal values within 1.5 % of llama.cpp's."""
    x = gauss(512, 512)
    back = dequantize(encode(kind, x).numpy(), GGMLQuantizationType(kind.number))
    error = 100 * np.sqrt(((back - x.numpy()) ** 2).mean() / (x.numpy() ** 2).mean())
    assert error == pytest.approx(ERRORS[kind.name], rel=0.015)


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind.name != "Q8_0"], ids=lambda kind: kind.name)
def test_importance_lowers_the_weighted_error(kind: QuantType) -> None:
    x, importance = gauss(64, 512), gauss(1, 512, 1)[0].abs() ** 3 + 0.01
    errors = []
    for weights in (None, importance):
        back = dequantize(encode(kind, x, weights).numpy(), GGMLQuantizationType(kind.number))
        errors.append(((back - x.numpy()) ** 2 * importance.numpy()).sum())
    assert errors[1] < 0.95 * errors[0]


@kinds
@needs_numba
def test_back_ends_agree(kind: QuantType) -> None:
    """Kernels against torch, with and without importance."""
    x, importance = gauss(6, 768), gauss(1, 768, 1)[0].abs()
    for weights in (None, importance):
        assert torch.equal(encode(kind, x, weights), in_torch(kind, x, weights))


@kinds
def test_any_cut_same_bytes(kind: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, and torch's chunks of two rows, against all at once."""
    x, importance = gauss(5, 512), gauss(1, 512, 1)[0].abs()
    whole = encode(kind, x, importance)
    assert torch.equal(torch.cat([encode(kind, x[i : i + 1], importance) for i in range(5)]), whole)
    monkeypatch.setattr(quantize, "_CPU_CHUNK", 1024)
    assert torch.equal(in_torch(kind, x, importance), whole)


@pytest.mark.parametrize("kind", QUANT_TYPES.values(), ids=lambda kind: kind.name)
def test_no_rows(kind: QuantType) -> None:
    assert encode(kind, torch.empty(0, 256)).shape == (0, kind.row_nbytes(256))


@kinds
def test_columns_must_fill_blocks(kind: QuantType) -> None:
    with pytest.raises(ValueError, match=f"{kind.name} needs columns in multiples of {kind.block}"):
        encode(kind, torch.zeros(2, kind.block + 16))


@pytest.mark.parametrize("kind", QUANT_TYPES.values(), ids=lambda kind: kind.name)
def test_rows_must_be_float32(kind: QuantType) -> None:
    with pytest.raises(ValueError, match="rows must be float32"):
        encode(kind, torch.zeros(2, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", QUANT_TYPES.values(), ids=lambda kind: kind.name)
def test_input_stays_and_is_not_shared(kind: QuantType) -> None:
    x = gauss(3, 256)
    before = x.clone()
    encode(kind, x, gauss(1, 256)[0].abs()).zero_()
    assert torch.equal(x, before)


def test_threads_at_once_same_bytes() -> None:
    """Eight encodings in four threads against one after the other."""
    x = [gauss(16, 512, seed) for seed in range(8)]
    for name in ("Q4_K", "Q6_K", "Q8_0"):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda rows: encode(QUANT_TYPES[name], rows), x))  # noqa: B023
        assert all(torch.equal(one, encode(QUANT_TYPES[name], rows)) for one, rows in zip(found, x, strict=True))


@needs_numba
def test_without_numba_torch_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gauss(2, 256)
    expected = encode(QUANT_TYPES["Q4_K"], x)
    assert (quantize.backend("cpu"), quantize.backend("cuda:1")) == ("numba", "torch")
    monkeypatch.setattr(numba_kernel, "available", lambda: False)
    assert quantize.backend("cpu") == "torch"
    assert torch.equal(encode(QUANT_TYPES["Q4_K"], x), expected)


@needs_numba
def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba finds no folder to write in: it says so with a RuntimeError."""
    import numba

    njit: Callable[..., Any] = numba.njit

    def nowhere(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    fresh = numba_kernel.Kernel(half_value.function)  # type: ignore[attr-defined]
    assert fresh(0x3C00) == 1.0


@needs_numba
def test_half_precision_is_numpy_s() -> None:
    """All finite halves back and forth, and floats between and beyond them, against numpy's conversion."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))][::7]
    values = halves.view(np.float16).astype(np.float32)
    assert all(half_value(int(h)) == v for h, v in zip(halves, values, strict=True))
    between = np.concatenate(
        [values, np.nextafter(values, np.float32(9)), values * np.float32(1.0004883), values * np.float32(1e-4)]
    )
    with np.errstate(over="ignore"):
        expected = between.astype(np.float16).view(np.uint16)
    assert [half_bits(v) for v in between] == expected.tolist()


def test_iq4_s_midpoints_decide_as_bisection_does() -> None:
    """Floats around every midpoint and value: ggml compares two differences, here x is compared with the midpoint."""
    values = np.array(iq4.VALUES, np.float32)
    near = np.concatenate([values, np.array(iq4.MIDPOINTS, np.float32)])
    x = np.concatenate(
        [near, np.nextafter(near, np.float32(-999)), np.nextafter(near, np.float32(999)), near * np.float32(1.001)]
    )
    upper = np.clip(np.searchsorted(values, x, "right"), 1, 15)
    bisected = np.where(x - values[upper - 1] < values[upper] - x, upper - 1, upper)
    bisected = np.where(x <= values[0], 0, np.where(x >= values[15], 15, bisected))
    assert iq4._index(torch.from_numpy(x)).tolist() == bisected.tolist()


MEMORY = """
import resource, sys, torch
from mergeforge import quants
torch.set_num_threads(1)
kind = quants.QUANT_TYPES[sys.argv[1]]
if sys.argv[2] == "torch":
    quants.compiled.available = lambda: False
x, weights = torch.ones(8, 4096).cumsum(1), torch.ones(4096)
for importance in (None, weights):
    quants.encode(kind, x, importance)
x = torch.rand(768, 4096)
out = len(x) * kind.row_nbytes(4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for importance in (None, weights):
    quants.encode(kind, x, importance)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - out, quants.scratch_nbytes(kind, "cpu"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory")
@kinds
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_temporaries_are_bounded(kind: QuantType, backend: str) -> None:
    """Peak resident memory of a process that encodes 12 MiB, beside input and output; 1.5 MiB of the allocator's."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind.name, backend], capture_output=True, text=True, check=True
    )
    held, promised = map(int, done.stdout.split())
    assert held <= promised + 3 * 2**19
