"""Bits per weight of file types, against known files of Llama 3.1 8B."""

from __future__ import annotations

import pytest

from mergeforge.gguf.file_types import file_type_named
from mergeforge.gguf.typical_size import typical_bits_per_weight


@pytest.mark.parametrize(
    ("name", "bits"),  # as llama-quantize prints them for this model (its README, tools/quantize)
    [("q2_k", 3.1593), ("q3_k_s", 3.6429), ("q4_k_s", 4.6672), ("q4_k_m", 4.8944), ("q6_k", 6.5633), ("q8_0", 8.5008)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert typical_bits_per_weight(file_type_named(name)) == pytest.approx(bits, abs=2e-3)
