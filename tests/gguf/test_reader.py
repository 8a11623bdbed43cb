"""The types of tensors in a GGUF file, against gguf-py."""

from __future__ import annotations

import gguf
import numpy as np

from mergeforge.gguf.reader import DEQUANTIZED_TYPES


def test_types_that_are_dequantized_are_those_of_gguf_py() -> None:
    """And two more, whose numbers may be missing in the gguf package."""
    known = {"Q1_0", "Q2_0"}
    for ggml_type in gguf.GGMLQuantizationType:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[ggml_type][1]), np.uint8)
        try:
            gguf.quants.dequantize(block, ggml_type)
        except NotImplementedError:
            continue
        known.add(ggml_type.name)
    assert known == DEQUANTIZED_TYPES
