"""The IQ1 to IQ3 types against digests of ggml's bytes, which tools/golden_grid_types recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.quantize_cases import grid_cases

from mergeforge.gguf.quantize import QUANT_TYPES, encode

pytestmark = pytest.mark.needs_kernels

GOLDEN = json.loads((Path(__file__).parent / "golden_grid_types.json").read_text(encoding="utf-8"))


def digest(*arrays: np.ndarray | None) -> str:
    data = b"".join(array.tobytes() for array in arrays if array is not None)
    return hashlib.sha256(data).hexdigest()[:12]


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_equal_ggmls(name: str) -> None:
    """20 kinds of rows of 3 x 512, with an imatrix that has zeros, and if the type can, without one."""
    different = []
    for case, x, importance in grid_cases(QUANT_TYPES[name]):
        rows, expected = GOLDEN[name][case]
        if digest(x, importance) != rows:
            pytest.skip("this numpy draws other random numbers; run the slow tests")
        weights = None if importance is None else torch.from_numpy(importance)
        if digest(encode(QUANT_TYPES[name], torch.from_numpy(x), weights).numpy()) != expected:
            different.append(case)
    assert different == []
