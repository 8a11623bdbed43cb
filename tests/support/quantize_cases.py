"""Rows on which two quantizers easily differ: every kind of weights that the tests compare."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from mergeforge.gguf.quantize import QuantType

Rows = Callable[[np.random.Generator, int, int], np.ndarray]


def _bf16(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    bits = _gauss(rng, rows, columns).view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32) * np.float32(0.02)


def _gauss(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.standard_normal((rows, columns)).astype(np.float32)


def _one_outlier(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    x = _gauss(rng, rows, columns) * np.float32(1e-3)
    x[:, columns // 3] = 100
    return x


def _sparse(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return _gauss(rng, rows, columns) * (rng.random((rows, columns)) < 0.05).astype(np.float32)


def _negative_zero(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    x = np.where(rng.random((rows, columns)) < 0.5, np.float32(-0.0), np.float32(0.0)).astype(np.float32)
    x[:, ::64] = rng.standard_normal(x[:, ::64].shape) * (rng.random(x[:, ::64].shape) < 0.3)
    return x


def _ties(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Few values, on a grid: equal magnitudes of both signs, and halfway points between levels."""
    return (rng.integers(-8, 9, (rows, columns)) * 0.125).astype(np.float32)


def _near_constant(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Negative values a few units in the last place apart: rounding makes their range zero or negative."""
    x = np.full((rows, columns), -1, np.float32).view(np.int32) + rng.integers(0, 4, (rows, columns), dtype=np.int32)
    return np.ascontiguousarray(x.view(np.float32))


def _scaled(factor: float) -> Rows:
    return lambda rng, rows, columns: _gauss(rng, rows, columns) * np.float32(factor)


def _filled(value: float) -> Rows:
    return lambda rng, rows, columns: np.full((rows, columns), value, np.float32)


def _heavy(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.standard_t(2, (rows, columns)).astype(np.float32)


def _wide(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Magnitudes from 1e-12 to 1e4 within one row."""
    return (_gauss(rng, rows, columns) * 10.0 ** rng.uniform(-12, 4, (rows, columns))).astype(np.float32)


def _steps(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Groups of very different magnitudes within a block, some all zero."""
    size = 10.0 ** rng.integers(-6, 3, (rows, columns // 16)) * (rng.random((rows, columns // 16)) < 0.8)
    return (_gauss(rng, rows, columns) * np.repeat(size, 16, 1)).astype(np.float32)


CASES: dict[str, Rows] = {
    "gauss": _gauss,
    "bf16": _bf16,
    "heavy tail": _heavy,
    "zeros": _filled(0),
    "constant": _filled(0.7),
    "negative constant": _filled(-0.7),
    "near constant": _near_constant,
    "positive": lambda rng, rows, columns: np.abs(_gauss(rng, rows, columns)) + np.float32(0.1),
    "negative": lambda rng, rows, columns: -np.abs(_gauss(rng, rows, columns)) - np.float32(0.1),
    "small": _scaled(1e-7),
    "tiny": _scaled(1e-16),
    "tinier": _scaled(1e-30),
    "subnormal": _scaled(1e-39),
    "huge": lambda rng, rows, columns: np.clip(_gauss(rng, rows, columns) * np.float32(3e4), -6e4, 6e4),
    "one outlier": _one_outlier,
    "sparse": _sparse,
    "negative zero": _negative_zero,
    "ties": _ties,
    "wide": _wide,
    "steps": _steps,
}


def importances(rng: np.random.Generator, columns: int) -> dict[str, np.ndarray]:
    """Importance vectors of several kinds, by name."""
    gauss = np.abs(rng.standard_normal(columns)).astype(np.float32)
    holes = gauss * (rng.random(columns) < 0.6).astype(np.float32)
    holes[: columns // 4] = 0
    heavy = (10.0 ** rng.uniform(-6, 4, columns)).astype(np.float32)
    return {
        "ones": np.ones(columns, np.float32),
        "gauss": gauss,
        "holes": holes,
        "heavy": heavy,
        "zeros": np.zeros(columns, np.float32),
    }


def grid_cases(quant_type: QuantType) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """All kinds of rows at 3 x 512 by name, with holes in the importance, and if the type can, without it."""
    for name, make_rows in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = np.ascontiguousarray(make_rows(rng, 3, 512))
        yield name, x, importances(rng, 512)["holes"]
        if not quant_type.needs_importance:
            yield f"{name}, no importance", x, None
