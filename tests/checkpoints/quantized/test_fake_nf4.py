"""base_numerics dequant_nf4: fake-quantized 16-bit weights, compared with bitsandbytes and checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoint_values import opened, values
from test_against_libraries import CASES

from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.core import tensor_info
from mergeforge.quant_codecs import nf4


def fake_nf4(folder: Path, weight: torch.Tensor, double_quant: bool) -> FakeQuantizedTensor:
    return FakeQuantizedTensor(opened(folder, {"weight": weight}).tensors["weight"], double_quant)


@pytest.mark.parametrize("elements", [1 << 19, 1000, 37 * 50])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("simulated")])
def test_equals_bitsandbytes_bit_for_bit(
    case: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, and rows that start and end inside NF4 blocks of 64."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", elements)
    tensors = CASES[case][0]
    for rows in (1, 1 << 20):
        tensor = values(fake_nf4(tmp_path, tensors["weight"], "nested" in case), rows)
        assert torch.equal(tensor, tensors["="])


def test_nf4_levels_do_not_change(tmp_path: Path) -> None:
    """Weights that are NF4 levels times a power of two stay the same, and so does a block of zeros."""
    levels = torch.tensor(nf4.NF4).bfloat16().float()
    weight = torch.cat([levels.repeat(4) * 0.5, torch.zeros(64)]).view(2, 64).bfloat16()
    assert torch.equal(values(fake_nf4(tmp_path, weight, False)), weight)


def test_needs_statistics_only_for_double_quantization(tmp_path: Path) -> None:
    weight = torch.ones(4, 64).bfloat16()
    assert fake_nf4(tmp_path, weight, True).needs_stats
    assert not fake_nf4(tmp_path, weight, False).needs_stats


def test_the_dynamic_map_is_symmetric_except_for_its_end() -> None:
    levels = nf4.dynamic_map(torch.device("cpu"))
    assert len(levels) == 256
    assert levels[255] == 1
    assert levels[127] == 0
    assert torch.equal(levels[:127], -levels[128:255].flip(0))
