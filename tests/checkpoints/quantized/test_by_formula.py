"""Every format compared with its published formula on the dense tensor, in any tiles, and with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoint_values import opened, values, write_shards
from support.quantized_cases import FORMATS, fp8_block, fp8_channel

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.core import tensor_info


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * torch.linspace(0.01, 0.05, shape[0]).view(-1, *[1] * (len(shape) - 1))).bfloat16()


def checkpoint(folder: Path, kind: str, weight: torch.Tensor) -> tuple[Checkpoint, torch.Tensor]:
    stored, dense, settings = FORMATS[kind](weight)
    config = {"quantization_config": settings, "torch_dtype": "bfloat16"}
    return opened(folder, {f"m.{leaf}": value for leaf, value in stored.items()}, config), dense


@pytest.mark.parametrize("elements", [1 << 19, 500, 3000])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_equal_their_formula(kind: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of all rows, and of a few rows with edges inside words and blocks; rounded once, to bf16."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", elements)
    loaded, dense = checkpoint(tmp_path, kind, weights(96, 80))
    assert list(loaded.tensors) == ["m.weight"]
    assert torch.equal(values(loaded.tensors["m.weight"], rows=1), dense.bfloat16())
    assert torch.equal(values(loaded.tensors["m.weight"]), dense.bfloat16())


def test_fp8_blocks_that_do_not_divide_the_shape(tmp_path: Path) -> None:
    """The last row and column of scales cover smaller blocks: 40 x 70 in blocks of 16 x 32."""
    stored, dense, settings = fp8_block(weights(40, 70), 16, 32)
    loaded = opened(tmp_path, {f"m.{leaf}": value for leaf, value in stored.items()}, {"quantization_config": settings})
    assert torch.equal(values(loaded.tensors["m.weight"], rows=1), dense.bfloat16())


def test_fp8_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, _, settings = fp8_block(weights(48, 64), 16, 32)
    loaded = opened(tmp_path, {f"m.{leaf}": value for leaf, value in stored.items()}, {"quantization_config": settings})
    expected = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], torch.bfloat16)
    assert torch.equal(values(loaded.tensors["m.weight"]), expected)


@pytest.mark.parametrize("elements", [1 << 19, 100])
def test_stacked_fp8_experts(elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape (experts, out, in): a block of 16 rows ends at the 40 rows of an expert."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", elements)
    experts = [fp8_block(weights(40, 32, seed=seed)) for seed in range(3)]
    tensors = {
        "experts.up": torch.stack([stored["weight"].view(torch.uint8) for stored, _, _ in experts]).view(
            torch.float8_e4m3fn
        ),
        "experts.up_scale_inv": torch.stack([stored["weight_scale_inv"] for stored, _, _ in experts]),
    }
    loaded = opened(tmp_path, tensors, {"quantization_config": experts[0][2]})
    expected = torch.stack([dense for _, dense, _ in experts]).bfloat16()
    assert torch.equal(values(loaded.tensors["experts.up"], rows=1), expected)


def test_mxfp8_scales_are_exponents(tmp_path: Path) -> None:
    """MXFP8: 32 columns share 2^(e - 127); 0 is 2^-127."""
    codes = torch.randn(4, 64).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120, 127], [0, 1], [130, 110], [127, 250]], dtype=torch.uint8)
    tensors = {"m.weight": codes, "m.weight_scale": exponents}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}, "dtype": "float32"}
    expected = codes.double() * (exponents.double() - 127).exp2().repeat_interleave(32, 1)
    assert torch.equal(values(opened(tmp_path, tensors, config).tensors["m.weight"]), expected.float())


def test_finds_a_scale_in_another_shard(tmp_path: Path) -> None:
    stored, dense, settings = fp8_channel(weights(8, 16))
    shards = [{"m.weight": stored["weight"]}, {"m.weight_scale": stored["weight_scale"]}]
    folder = write_shards(tmp_path / "model", shards, {"quantization_config": settings})
    loaded = open_checkpoint(folder, "the model")
    assert torch.equal(values(loaded.tensors["m.weight"]), dense.bfloat16())
    assert len(loaded.files) == 2
    assert loaded.nbytes == 8 * 16 + 8 * 4


@pytest.mark.parametrize("elements", [1 << 19, 200, 1000])
def test_mxfp4_equals_transformers(elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss experts, (E, out, groups, 16) to (E, in, out), in tiles that end inside groups and experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 24, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 24, 2), generator=generator, dtype=torch.uint8)
    tensors = {
        "mlp.experts.up_blocks": blocks,
        "mlp.experts.up_scales": scales,
        "mlp.experts.up_bias": torch.zeros(3, 24),
    }
    loaded = opened(tmp_path, tensors, {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"})
    assert set(loaded.tensors) == {"mlp.experts.up", "mlp.experts.up_bias"}
    expected = convert_moe_packed_tensors(blocks, scales)
    for rows in (1, 1 << 20):
        assert torch.equal(values(loaded.tensors["mlp.experts.up"], rows), expected)
