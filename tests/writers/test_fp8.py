"""FP8 output: chunks of different heights against transformers' quantizer, and read back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mergeforge.core import tensor_info as table
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.file_layout import Extent
from mergeforge.quant_codecs import fp8
from mergeforge.writers.encoder import chunk_ranges
from mergeforge.writers.fp8 import FP8Encoder, stored_tensors

BLOCK = (16, 32)


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def written(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What both encoders write, chunk by chunk."""
    info = TensorInfo("w", "BF16", tuple(values.shape))
    written_tensors = []
    for stored, scales in zip(stored_tensors(info, BLOCK), (False, True), strict=True):
        encoder = FP8Encoder(info, Extent("file", 100, stored.nbytes), BLOCK, scales)
        raw = torch.zeros(stored.nbytes, dtype=torch.uint8)
        for start, stop in chunk_ranges(0, info.rows, encoder):
            [(offset, nbytes)] = encoder.byte_ranges(start, stop)
            encoder.encode(values[start:stop], start, raw[offset - 100 : offset - 100 + nbytes])
        written_tensors.append(raw.view(torch.float32 if scales else torch.float8_e4m3fn).view(stored.shape))
    return written_tensors[0], written_tensors[1]


@pytest.mark.parametrize("elements", [1 << 19, 1000])
def test_bits_equal_transformers(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    monkeypatch.setattr(table, "BLOCK_ELEMENTS", elements)
    values = weight(96, 64)
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt="float")
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("m.weight", values)
    codes, scales = written(values)
    assert torch.equal(codes.view(torch.uint8), theirs["m.weight"].view(torch.uint8))
    assert torch.equal(scales, theirs["m.weight_scale_inv"])


@pytest.mark.parametrize("elements", [1 << 19, 1000])
def test_blocks_at_the_edges_read_back(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a step of E4M3: 1/16 of each number, or half of the smallest step of its block."""
    monkeypatch.setattr(table, "BLOCK_ELEMENTS", elements)
    values = weight(41, 70)
    codes, scales = written(values)
    assert scales.shape == (3, 3)
    back = fp8.dequantize(codes, scales.repeat_interleave(16, 0)[:41], 32)
    assert bool(((back - values).abs() <= values.abs() / 16 + scales.max() / 512).all())


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-36])
def test_block_of_tiny_values_becomes_zero(value: float) -> None:
    """Values so small that the factor to 448 exceeds float32."""
    codes, scales = written(torch.full((16, 32), value))
    assert not codes.float().any()
    assert scales.tolist() == [[1.0]]
