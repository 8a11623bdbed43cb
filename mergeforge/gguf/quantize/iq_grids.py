"""IQ1, IQ2 and IQ3: values of about 1.6 to 3.4 bits on a grid of 8 or 4 at a time, blocks of 256.

Only the C library encodes them (native/quantize_iq1.c and quantize_iq2.c): each group of values searches thousands of
grid points, in an order that torch cannot follow. Rows on a GPU are copied to the CPU for it.
"""

from __future__ import annotations

from mergeforge.gguf.quantize.k_quants import BLOCK
from mergeforge.gguf.quantize.quant_type import QuantType, register

for _name, _number, _nbytes, _needs_importance in (
    ("IQ2_XXS", 16, 66, True),
    ("IQ2_XS", 17, 74, True),
    ("IQ3_XXS", 18, 98, False),
    ("IQ1_S", 19, 50, True),
    ("IQ3_S", 21, 110, False),
    ("IQ2_S", 22, 82, False),
    ("IQ1_M", 29, 56, False),
):
    register(QuantType(_name, _number, BLOCK, _nbytes, None, needs_importance=_needs_importance))
