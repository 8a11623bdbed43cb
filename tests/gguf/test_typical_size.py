"""Bits per weight of file types, against known files of Llama 3.1 8B."""

from __future__ import annotations

import pytest
from support.imatrix_files import NEED_IMATRIX

from mergeforge.gguf.file_types import FILE_TYPES, file_type_named
from mergeforge.gguf.typical_size import typical_bits_per_weight, typically_needs_imatrix


@pytest.mark.parametrize(
    ("name", "bits"),  # as llama-quantize prints them for this model (its README, tools/quantize)
    [
        *(
            ("q2_k", 3.1593),
            ("q3_k_s", 3.6429),
            ("q4_k_s", 4.6672),
            ("q4_k_m", 4.8944),
            ("q6_k", 6.5633),
            ("q8_0", 8.5008),
        ),
        *(("iq1_s", 2.0042), ("iq2_xxs", 2.3824), ("iq2_m", 2.9294), ("iq3_xxs", 3.2548), ("iq3_xs", 3.4977)),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert typical_bits_per_weight(file_type_named(name)) == pytest.approx(bits, abs=2e-3)


def test_types_that_need_an_imatrix() -> None:
    """Those that llama-quantize refuses without one."""
    assert {name for name, file_type in FILE_TYPES.items() if typically_needs_imatrix(file_type)} == set(NEED_IMATRIX)
