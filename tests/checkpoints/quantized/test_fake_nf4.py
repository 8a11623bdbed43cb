"""base_numerics dequant_nf4: 16-bit weights quantised and dequantised in memory, against bitsandbytes and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoint_values import opened, values
from test_against_libraries import CASES

from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.core import tensor_info as table
from mergeforge.quant_codecs import nf4


def simulated(folder: Path, weight: torch.Tensor, double_quant: bool) -> FakeQuantizedTensor:
    return FakeQuantizedTensor(opened(folder, {"weight": weight}).tensors["weight"], double_quant)


@pytest.mark.parametrize("elements", [1 << 19, 1000, 37 * 50])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("simulated")])
def test_bitsandbytes_makes_the_same_bits(
    case: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks: whole tensors, and rows that begin and end inside NF4's blocks of 64."""
    monkeypatch.setattr(table, "BLOCK_ELEMENTS", elements)
    tensors = CASES[case][0]
    for rows in (1, 1 << 20):
        found = values(simulated(tmp_path, tensors["weight"], "nested" in case), rows)
        assert torch.equal(found, tensors["="])


def test_levels_are_kept(tmp_path: Path) -> None:
    """Weights that are NF4 levels times a power of two stay what they are; a block of zeros stays zero."""
    levels = torch.tensor(nf4.NF4).bfloat16().float()
    weight = torch.cat([levels.repeat(4) * 0.5, torch.zeros(64)]).view(2, 64).bfloat16()
    assert torch.equal(values(simulated(tmp_path, weight, False)), weight)


def test_it_learns_only_what_it_must(tmp_path: Path) -> None:
    weight = torch.ones(4, 64).bfloat16()
    assert simulated(tmp_path, weight, True).needs_stats
    assert not simulated(tmp_path, weight, False).needs_stats


def test_the_dynamic_map_is_symmetric_but_for_its_end() -> None:
    levels = nf4.dynamic_map(torch.device("cpu"))
    assert len(levels) == 256
    assert levels[255] == 1
    assert levels[127] == 0
    assert torch.equal(levels[:127], -levels[128:255].flip(0))
