"""The values of encoded blocks, against ggml's."""

from __future__ import annotations

import numpy as np
import pytest
from support.ggml_reference import ggml_dequantize

from mergeforge.gguf.dequantize import GGUF_PY_TYPES, OWN_TYPES, dequantize
from mergeforge.gguf.quantize import QUANT_TYPES

BLOCK_TYPES = [name for name in sorted(GGUF_PY_TYPES | OWN_TYPES.keys()) if name in QUANT_TYPES]
BLOCK_TYPES = [name for name in BLOCK_TYPES if QUANT_TYPES[name].block > 1]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_equal_ggmls(name: str) -> None:
    """Blocks of random bytes, two blocks in a row; the few with scales that are not finite are left out."""
    quant_type = QUANT_TYPES[name]
    encoded = np.random.default_rng(1).integers(0, 256, (200, 2 * quant_type.nbytes), np.uint8)
    theirs = ggml_dequantize(name, encoded.tobytes(), 400 * quant_type.block).reshape(200, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        ours = dequantize(encoded, name)
    finite = np.isfinite(theirs).all(1) & (np.abs(theirs).max(1) < 1e30)
    assert finite.sum() > 100
    np.testing.assert_array_equal(ours[finite], theirs[finite])
