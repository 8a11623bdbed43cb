"""The C library's quantizers: every vector width gives the same bytes, and no argument or value makes them crash."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.quantize_cases import CASES, importances

from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, encode
from mergeforge.native import bindings

pytestmark = pytest.mark.needs_kernels

BLOCK_TYPES = [quant_type for quant_type in QUANT_TYPES.values() if quant_type.block > 1]
block_types = pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda quant_type: quant_type.name)


@pytest.fixture
def widths() -> Iterator[range]:
    """The vector widths of this processor; a test may choose each with vector_width()."""
    widest = bindings.kernels().vector_width()
    yield range(widest + 1)
    bindings.kernels().vector_width(widest)


def test_has_all_types_of_blocks() -> None:
    """The C library's table against the registered types."""
    sizes = {quant_type.name: (quant_type.block, quant_type.nbytes) for quant_type in BLOCK_TYPES}
    assert sizes == bindings.kernels().QUANT_TYPES


@block_types
def test_every_vector_width_gives_the_same_bytes(quant_type: QuantType, widths: range) -> None:
    """All kinds of rows and importance; 1 to 129 blocks, so that the last groups taken at a time are not full.

    The types that only the C library encodes are slow and take four blocks at a time.
    """
    shapes = ((1, 1), (1, 3), (5, 1), (33, 2), (129, 1))
    for rows, blocks in shapes if quant_type.quantize_torch else shapes[1:3]:
        columns = blocks * quant_type.block
        for name, make_rows in CASES.items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            x = torch.from_numpy(np.ascontiguousarray(make_rows(rng, rows, columns)))
            for weights in (None, *map(torch.from_numpy, importances(rng, columns).values())):
                if weights is None and quant_type.needs_importance:
                    continue
                encoded = []
                for width in widths:
                    assert bindings.kernels().vector_width(width) == width
                    encoded.append(encode(quant_type, x, weights, backend="native"))
                assert all(torch.equal(blocks, encoded[0]) for blocks in encoded), f"{name}, {rows} x {columns}"


@block_types
def test_nan_and_infinity_are_encoded_somehow(quant_type: QuantType, widths: range) -> None:
    """Callers refuse them; here only nothing may crash, and other blocks keep their bytes."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((9, 512)).astype(np.float32)
    wrong = x.copy()
    wrong[2:7] = rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1], np.float32), (5, 512))
    for width in widths:
        bindings.kernels().vector_width(width)
        for weights in (None, torch.rand(512), torch.full((512,), torch.nan), torch.full((512,), torch.inf)):
            if weights is None and quant_type.needs_importance:
                continue
            encoded = encode(quant_type, torch.from_numpy(wrong), weights, backend="native")
            expected = encode(quant_type, torch.from_numpy(x), weights, backend="native")
            assert torch.equal(encoded[:2], expected[:2]) and torch.equal(encoded[7:], expected[7:])


def quantize(**changed: Any) -> None:
    arguments: dict[str, Any] = {"type": "Q4_K", "rows": np.ones((3, 512), np.float32), "importance": None}
    arguments |= {"columns": 512, "out": np.zeros(6 * 144, np.uint8), **changed}
    bindings.kernels().quantize(*arguments.values())


def test_the_arguments_that_the_others_are_made_from_are_right() -> None:
    out = np.zeros((3, 2 * 144), np.uint8)
    quantize(out=out, importance=np.ones(512, np.float32))
    assert out.any(1).all()
    quantize(rows=np.empty((0, 512), np.float32), out=np.empty(0, np.uint8))
    quantize(rows=torch.empty(0, 512).numpy(), out=torch.empty(0, dtype=torch.uint8).numpy())


READ_ONLY = np.zeros(6 * 144, np.uint8)
READ_ONLY.flags.writeable = False
UNALIGNED = np.zeros(4 * 3 * 512 + 1, np.uint8)[1:].view(np.float32)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "an unknown type": (ValueError, {"type": "Q4_X"}),
    "a type without blocks": (ValueError, {"type": "F32"}),
    "the type is no string": (TypeError, {"type": 4}),
    "rows are float64": (TypeError, {"rows": np.ones((3, 512))}),
    "rows are int32": (TypeError, {"rows": np.ones((3, 512), np.int32)}),
    "rows are no array": (TypeError, {"rows": None}),
    "rows are not contiguous": (ValueError, {"rows": np.ones((3, 1024), np.float32)[:, ::2]}),
    "rows are transposed": (ValueError, {"rows": np.ones((512, 3), np.float32).T}),
    "rows are not aligned": (ValueError, {"rows": UNALIGNED}),
    "rows are not whole": (ValueError, {"rows": np.ones(3 * 512 + 256, np.float32)}),
    "a row is missing": (ValueError, {"rows": np.ones((2, 512), np.float32)}),
    "there is a row too many": (ValueError, {"rows": np.ones((4, 512), np.float32)}),
    "columns are not whole blocks": (ValueError, {"columns": 384, "rows": np.ones((4, 384), np.float32)}),
    "there are no columns": (ValueError, {"columns": 0}),
    "columns are negative": (ValueError, {"columns": -512}),
    "columns are huge": (ValueError, {"columns": 1 << 62}),
    "columns are no number": (TypeError, {"columns": "512"}),
    "importance is too short": (ValueError, {"importance": np.ones(511, np.float32)}),
    "importance is too long": (ValueError, {"importance": np.ones(513, np.float32)}),
    "importance is empty": (ValueError, {"importance": np.ones(0, np.float32)}),
    "importance is float64": (TypeError, {"importance": np.ones(512)}),
    "importance is no array": (TypeError, {"importance": 1.0}),
    "importance is missing": (
        ValueError,
        {"type": "IQ2_XS", "out": np.zeros(6 * 74, np.uint8)},
    ),
    "out is too short": (ValueError, {"out": np.zeros(6 * 144 - 1, np.uint8)}),
    "out is too long": (ValueError, {"out": np.zeros(6 * 144 + 1, np.uint8)}),
    "out is float32": (TypeError, {"out": np.zeros(6 * 36, np.float32)}),
    "out is read-only": (ValueError, {"out": READ_ONLY}),
    "out is bytes": (ValueError, {"out": bytes(6 * 144)}),
    "out is not contiguous": (ValueError, {"out": np.zeros(12 * 144, np.uint8)[::2]}),
    "out is no array": (TypeError, {"out": None}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case: str) -> None:
    """And nothing is written."""
    error, changed = WRONG[case]
    out = np.full(6 * 144, 7, np.uint8)
    with pytest.raises(error):
        quantize(**{"out": out, **changed})
    assert bool((out == 7).all())


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="there is no quantizer for Q4_X"):
        quantize(type="Q4_X")
    with pytest.raises(ValueError, match="columns must be a multiple of 256, not 384"):
        quantize(columns=384)
    with pytest.raises(ValueError, match="rows are 1536 elements, not a multiple of 1024"):
        quantize(columns=1024)
    with pytest.raises(ValueError, match="importance has 511 elements instead of 512"):
        quantize(importance=np.ones(511, np.float32))
    with pytest.raises(ValueError, match="out has 863 elements instead of 864"):
        quantize(out=np.zeros(863, np.uint8))
