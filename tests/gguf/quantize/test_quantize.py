"""mergeforge.gguf.quantize without ggml: expected errors, the same bytes for any cut of the rows, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mergeforge.gguf import quantize
from mergeforge.gguf.dequantize import dequantize
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, encode, iq4
from mergeforge.native import bindings

BLOCK_TYPES = [quant_type for quant_type in QUANT_TYPES.values() if quant_type.block > 1]
block_types = pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda quant_type: quant_type.name)
# Relative error in percent for normally distributed weights, measured with llama.cpp's quantizer.
ERRORS = {"Q8_0": 0.54, "Q6_K": 1.77, "Q5_K": 3.61, "Q5_1": 3.78, "Q5_0": 4.27, "Q4_K": 7.13, "IQ4_NL": 7.61}
ERRORS |= {"IQ4_XS": 7.67, "Q4_1": 7.82, "Q4_0": 8.59, "Q3_K": 15.1, "Q2_K": 29.6}
ERRORS |= {"MXFP4": 11.5, "NVFP4": 9.51, "Q1_0": 60.0, "Q2_0": 71.9, "TQ1_0": 80.8, "TQ2_0": 80.8}
ERRORS |= {"IQ3_S": 16.6, "IQ3_XXS": 21.4, "IQ2_S": 26.5, "IQ2_XS": 30.0, "IQ2_XXS": 34.4, "IQ1_S": 48.6, "IQ1_M": 58.3}
IGNORES_IMPORTANCE = {"Q8_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"}


def least_importance(quant_type: QuantType, columns: int) -> torch.Tensor | None:
    """None, or ones for a type that needs importance."""
    return torch.ones(columns) if quant_type.needs_importance else None


def gauss(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def test_types_match_the_gguf_package() -> None:
    """Numbers, block sizes and bytes against the gguf package's table; the newest types may not be in it."""
    for quant_type in QUANT_TYPES.values():
        if quant_type.number not in {number.value for number in GGMLQuantizationType}:
            continue
        assert (quant_type.block, quant_type.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType(quant_type.number)]
        assert GGMLQuantizationType(quant_type.number).name == quant_type.name


@block_types
def test_error_equals_llama_cpps(quant_type: QuantType) -> None:
    """The relative error of 512 x 512 normal values, within 1.5 % of llama.cpp's."""
    x = gauss(512, 512)
    back = dequantize(encode(quant_type, x, least_importance(quant_type, 512)).numpy(), quant_type.name)
    error = 100 * np.sqrt(((back - x.numpy()) ** 2).mean() / (x.numpy() ** 2).mean())
    assert error == pytest.approx(ERRORS[quant_type.name], rel=0.015)


@pytest.mark.parametrize(
    "quant_type",
    [quant_type for quant_type in BLOCK_TYPES if quant_type.name not in IGNORES_IMPORTANCE],
    ids=lambda quant_type: quant_type.name,
)
def test_importance_lowers_the_weighted_error(quant_type: QuantType) -> None:
    x, importance = gauss(64, 512), gauss(1, 512, 1)[0].abs() ** 3 + 0.01
    errors = []
    for weights in (least_importance(quant_type, 512), importance):
        back = dequantize(encode(quant_type, x, weights).numpy(), quant_type.name)
        errors.append(((back - x.numpy()) ** 2 * importance.numpy()).sum())
    assert errors[1] < 0.95 * errors[0]


@block_types
@pytest.mark.needs_kernels
def test_backends_agree(quant_type: QuantType) -> None:
    """The C library against torch, without and with importance."""
    assert quant_type.has_native
    if quant_type.quantize_torch is None:
        pytest.skip(f"only the C library encodes {quant_type.name}")
    x, importance = gauss(6, 768), gauss(1, 768, 1)[0].abs()
    for weights in (None, importance):
        native = encode(quant_type, x, weights, backend="native")
        assert torch.equal(native, encode(quant_type, x, weights, backend="torch"))


@block_types
def test_any_cut_of_the_rows_gives_the_same_bytes(quant_type: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, and torch chunks of two rows, against all rows at once."""
    x, importance = gauss(5, 512), gauss(1, 512, 1)[0].abs()
    whole = encode(quant_type, x, importance)
    assert torch.equal(torch.cat([encode(quant_type, x[i : i + 1], importance) for i in range(5)]), whole)
    monkeypatch.setattr(quantize, "CPU_CHUNK", 1024)
    assert torch.equal(encode(quant_type, x, importance, backend="torch"), whole)


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=lambda quant_type: quant_type.name)
def test_no_rows_give_no_bytes(quant_type: QuantType) -> None:
    assert encode(quant_type, torch.empty(0, 256), least_importance(quant_type, 256)).shape == (
        0,
        quant_type.row_nbytes(256),
    )


@block_types
def test_columns_must_fill_blocks(quant_type: QuantType) -> None:
    with pytest.raises(ValueError, match=f"{quant_type.name} needs columns in multiples of {quant_type.block}"):
        encode(quant_type, torch.zeros(2, quant_type.block + 16), torch.ones(quant_type.block + 16))


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=lambda quant_type: quant_type.name)
def test_rows_must_be_float32(quant_type: QuantType) -> None:
    with pytest.raises(ValueError, match="rows must be float32"):
        encode(quant_type, torch.zeros(2, 256, dtype=torch.bfloat16), torch.ones(256))


def test_types_without_a_torch_encoder_need_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    quant_type = QUANT_TYPES["IQ2_XS"]
    if quant_type.has_native:
        with pytest.raises(ValueError, match="IQ2_XS needs an importance vector"):
            encode(quant_type, gauss(1, 256))
    monkeypatch.setattr(bindings, "load_library", lambda: None)
    assert not quant_type.can_encode and QUANT_TYPES["Q4_K"].can_encode
    with pytest.raises(ValueError, match="IQ2_XS cannot be encoded"):
        encode(quant_type, gauss(1, 256), torch.ones(256))


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=lambda quant_type: quant_type.name)
def test_input_is_neither_changed_nor_shared(quant_type: QuantType) -> None:
    x = gauss(3, 256)
    before = x.clone()
    encode(quant_type, x, gauss(1, 256)[0].abs()).zero_()
    assert torch.equal(x, before)


def test_threads_give_the_same_bytes() -> None:
    """Eight tensors encoded in four threads, against one after another."""
    x = [gauss(16, 512, seed) for seed in range(8)]
    for name in ("Q4_K", "Q6_K", "Q8_0"):
        with ThreadPoolExecutor(4) as pool:
            encoded = list(pool.map(lambda rows: encode(QUANT_TYPES[name], rows), x))  # noqa: B023
        assert all(
            torch.equal(blocks, encode(QUANT_TYPES[name], rows)) for blocks, rows in zip(encoded, x, strict=True)
        )


@pytest.mark.needs_kernels
def test_torch_encodes_without_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gauss(2, 256)
    expected = encode(QUANT_TYPES["Q4_K"], x)
    assert (quantize.backend_for("cpu"), quantize.backend_for("cuda:1")) == ("native", "torch")
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    assert quantize.backend_for("cpu") == "torch"
    assert torch.equal(encode(QUANT_TYPES["Q4_K"], x), expected)


@pytest.mark.needs_kernels
def test_half_precision_matches_numpy() -> None:
    """Finite halves, and floats between and beyond them, against numpy's conversion. Q5_0's d is the largest / -16."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves) & (halves != 0)]
    values = halves.astype(np.float32)
    halfway = (values[:-1] + values[1:]) / 2
    between = np.concatenate([values, halfway, np.nextafter(halfway, np.float32(9)), values * np.float32(1.0004883)])
    between = np.concatenate([between, values * np.float32(1e-4), values * np.float32(1e4)])
    between = between[between != 0]
    x = torch.zeros(len(between), 32)
    x[:, 7] = torch.from_numpy(between) * -16
    blocks = encode(QUANT_TYPES["Q5_0"], x, backend="native").numpy()
    with np.errstate(over="ignore"):
        expected = between.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.uint16)[:, 0], expected)


def test_iq4_midpoints_choose_the_level_that_ggmls_bisection_chooses() -> None:
    """Floats around every midpoint and value. ggml compares two differences; here x is compared with the midpoint."""
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
from mergeforge.gguf import quantize
torch.set_num_threads(1)
kind = quantize.QUANT_TYPES[sys.argv[1]]
if sys.argv[2] == "torch":
    quantize.bindings.is_available = lambda: False
x, weights = torch.ones(8, 4096).cumsum(1), torch.ones(4096)
for importance in (weights,) if kind.needs_importance else (None, weights):
    quantize.encode(kind, x, importance)
x = torch.rand(768, 4096)
out = len(x) * kind.row_nbytes(4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for importance in (weights,) if kind.needs_importance else (None, weights):
    quantize.encode(kind, x, importance)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - out, quantize.scratch_nbytes(kind, "cpu"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory")
@block_types
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.needs_kernels)])
def test_temporaries_stay_within_scratch_nbytes(quant_type: QuantType, backend: str) -> None:
    """Peak memory of a process that encodes 12 MiB, without input and output; 1.5 MiB are the allocator's."""
    if backend == "torch" and quant_type.quantize_torch is None:
        pytest.skip(f"only the C library encodes {quant_type.name}")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, quant_type.name, backend], capture_output=True, text=True, check=True
    )
    measured, promised = map(int, done.stdout.split())
    assert measured <= promised + 3 * 2**19
