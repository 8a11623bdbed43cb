"""GGUF encoders: chunks of a stored tensor are written to the same bytes as the whole tensor rearranged at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergeforge.core import tensor_info
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.quantize import QUANT_TYPES
from mergeforge.io.file_layout import Extent
from mergeforge.writers.encoder import chunk_alignment, chunk_ranges
from mergeforge.writers.gguf import GGUFEncoder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 640)  # 20 rows of 32 columns: no multiple of a head


def written(target: TensorTarget, values: torch.Tensor, type_name: str = "F32") -> np.ndarray:
    """The bytes of the GGUF tensor that the encoder fills chunk by chunk; bytes that are not written are 255."""
    info = TensorInfo("w", "F32", tuple(values.shape))
    quant_type = QUANT_TYPES[type_name]
    nbytes = math.prod(target.shape[:-1]) * quant_type.row_nbytes(target.shape[-1])
    encoder = GGUFEncoder("q", info, target, quant_type, Extent("f", 64, nbytes), "cpu")
    file = np.full(64 + nbytes, 255, dtype=np.uint8)
    rows = values.reshape(info.rows, info.columns)
    assert chunk_alignment(info.block_rows, [encoder], info.rows) % encoder.chunk_rows in (
        0,
        info.rows % encoder.chunk_rows,
    )
    for start, stop in chunk_ranges(0, info.rows, encoder):
        into = torch.empty(encoder.chunk_nbytes(start, stop), dtype=torch.uint8)
        before = rows[start:stop].clone()
        encoder.encode(rows[start:stop], start, into)
        assert torch.equal(rows[start:stop], before)
        assert len(into) <= encoder.row_nbytes * (stop - start)
        position = 0
        for offset, size in encoder.byte_ranges(start, stop):
            file[offset : offset + size] = into[position : position + size].numpy()
            position += size
        assert position == len(into)
    assert (file[:64] == 255).all()
    return file[64:]


def as_floats(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return data.view(np.float32).reshape(shape)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rows_in_their_order() -> None:
    values = random(50, 32)
    assert np.array_equal(as_floats(written(TensorTarget("t", (50, 32)), values), (50, 32)), values.numpy())


def test_rotary_rows_are_interleaved() -> None:
    values, rows = random(64, 32), np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()
    assert np.array_equal(
        as_floats(written(TensorTarget("t", (64, 32), rows=rows), values), (64, 32)), values.numpy()[rows]
    )


def test_fused_qkv_rows_become_three_byte_ranges() -> None:
    values = random(3 * 30, 32)
    rows = np.concatenate([np.arange(90).reshape(5, 3, 6)[:, part].ravel() for part in range(3)])
    assert np.array_equal(
        as_floats(written(TensorTarget("t", (90, 32), rows=rows), values), (90, 32)), values.numpy()[rows]
    )


def test_expert_fills_only_its_own_slice() -> None:
    values = random(10, 32)
    found = as_floats(written(TensorTarget("t", (3, 10, 32), first_row=10), values), (3, 10, 32))
    assert np.array_equal(found[1], values.numpy())
    assert (found[[0, 2]].view(np.uint8) == 255).all()


def test_gate_and_up_are_split_from_fused_experts() -> None:
    values, rows = random(4, 24, 32), np.arange(96).reshape(4, 2, 12)
    for part in range(2):
        found = written(TensorTarget("t", (4, 12, 32), rows=rows[:, part].ravel()), values)
        assert np.array_equal(as_floats(found, (4, 12, 32)), values.numpy()[:, part * 12 : part * 12 + 12])


def test_matrices_are_transposed_and_every_second_row_selected() -> None:
    values = random(4, 32, 24)
    found = written(TensorTarget("t", (4, 12, 32), transpose=32, columns=slice(1, None, 2)), values)
    assert np.array_equal(as_floats(found, (4, 12, 32)), values.numpy().swapaxes(1, 2)[:, 1::2])


def test_a_part_of_each_head_is_transposed() -> None:
    values = random(4 * 24, 32)  # 4 heads of 16 + 8 rows
    heads = np.arange(96).reshape(4, 24)
    found = written(TensorTarget("t", (4, 32, 16), rows=heads[:, :16].ravel(), transpose=16), values)
    assert np.array_equal(as_floats(found, (4, 32, 16)), values.numpy().reshape(4, 24, 32)[:, :16].swapaxes(1, 2))


def test_constant_is_added() -> None:
    values = random(300)
    assert np.array_equal(as_floats(written(TensorTarget("t", (300,), add=1.0), values), (300,)), values.numpy() + 1)


def test_columns_are_reordered_and_values_scaled() -> None:
    """In every chunk, with rows in another order too."""
    values, rows, columns = random(60, 32), np.arange(60)[::-1].copy(), np.arange(32).reshape(4, 8).T.ravel()
    target = TensorTarget("t", (60, 32), rows=rows, column_order=columns, factors=(0.5, 3.0), add=1.0)
    expected = values.numpy()[rows][:, columns] * np.float32(0.5) * np.float32(3) + np.float32(1)
    assert np.array_equal(as_floats(written(target, values), (60, 32)), expected)


def test_logarithm_of_a_decay_becomes_the_decay() -> None:
    values = random(300)
    found = as_floats(written(TensorTarget("t", (300, 1), negative_exp=True), values), (300,))
    assert np.array_equal(found, -values.exp().numpy())


def test_vectors_are_stacked() -> None:
    values = random(8)
    found = as_floats(written(TensorTarget("t", (3, 8), first_row=2), values), (3, 8))
    assert np.array_equal(found[2], values.numpy())


def test_the_mean_of_a_vector_is_subtracted() -> None:
    values = random(128)
    found = as_floats(written(TensorTarget("t", (128,), centered=True), values), (128,))
    assert np.array_equal(found, (values - values.mean()).numpy())


def test_vectors_are_joined() -> None:
    values = random(8)
    found = as_floats(written(TensorTarget("t", (24,), first_column=16), values), (24,))
    assert np.array_equal(found[16:], values.numpy())


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_encoded_rows_equal_those_of_the_whole_tensor(type_name: str) -> None:
    from mergeforge.gguf.quantize import encode

    values, rows = random(64, 64), np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()
    whole = encode(QUANT_TYPES[type_name], values[torch.from_numpy(rows)]).numpy().ravel()
    assert np.array_equal(written(TensorTarget("t", (64, 64), rows=rows), values, type_name), whole)


def test_each_expert_uses_its_own_importance() -> None:
    from mergeforge.gguf.quantize import encode

    values, weights = random(3, 10, 32), random(3, 32).abs()
    info, quant_type = TensorInfo("w", "F32", (3, 10, 32)), QUANT_TYPES["Q4_0"]
    target = TensorTarget("t", (3, 10, 32))
    encoder = GGUFEncoder("q", info, target, quant_type, Extent("f", 0, 30 * 18), "cpu", importance=weights)
    rows = values.reshape(30, 32)
    chunks = []
    for start, stop in chunk_ranges(0, 30, encoder):
        into = torch.empty(encoder.chunk_nbytes(start, stop), dtype=torch.uint8)
        encoder.encode(rows[start:stop], start, into)
        chunks.append(into)
    expected = [encode(quant_type, values[expert], weights[expert]).view(-1) for expert in range(3)]
    assert torch.equal(torch.cat(chunks), torch.cat(expected))


@pytest.mark.parametrize(
    ("type_name", "largest", "larger"),
    [("F16", 65519.0, 65520.0), ("Q4_K", 65504.0, 65505.0), ("BF16", 3.39e38, 3.4e38), ("F32", 3.4e38, math.inf)],
)
def test_values_that_do_not_fit_overflow(type_name: str, largest: float, larger: float) -> None:
    encoder = GGUFEncoder(
        "q",
        TensorInfo("w", "F32", (1, 256)),
        TensorTarget("t", (1, 256)),
        QUANT_TYPES[type_name],
        Extent("f", 0, 0),
        "cpu",
    )
    assert not encoder.overflows(largest)
    assert encoder.overflows(larger)
    assert encoder.overflows(math.nan)
