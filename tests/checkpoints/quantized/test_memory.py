"""The memory that a quantised tensor's way declares: staged bytes, and blocks that exist at once."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_values import opened
from support.quantized_cases import FORMATS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.core.tensor_info import blocks, split_into_tiles
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.lazy import StatsPass, LazyTensor, collect_stats

SHAPE = (1024, 1088)  # two blocks of 480 rows and a rest
SLACK = 0.25  # of a block: tables, scales of a few rows


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                storage = one.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.held.values()))
        return result


def peak_of(way: LazyTensor, rows: int) -> float:
    """Blocks of float32 that exist at once while tiles of `rows` rows are computed, the scratch blocks too."""
    info = way.info
    tiles = [range(tile.start, tile.stop) for tile in split_into_tiles(info, rows)]
    block_nbytes = 4 * info.block_rows * info.columns
    staging = max(map(len, tiles)) * way.memory_cost.row_nbytes + way.memory_cost.fixed_nbytes
    with torch.inference_mode():
        worker = Worker("cpu", staging)
        facts = collect_stats(way, StatsPass(info, tiles, worker, {}, torch.float32))
        with Peak() as measured:
            for tile in tiles:
                worker.clear()
                value = way.load(tile, worker, facts, torch.float32)
                for start, stop in blocks(split_into_tiles(info, rows)[tiles.index(tile)], info):
                    value(start, stop)
    return measured.peak / block_nbytes


def checkpoint(folder: Path, kind: str) -> LazyTensor:
    stored, _, settings = FORMATS[kind](torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16())
    tensors = {f"m.{leaf}": value for leaf, value in stored.items()}
    return opened(folder, tensors, {"quantization_config": settings, "dtype": "bfloat16"}).tensors["m.weight"]


@pytest.mark.parametrize("kind", FORMATS)
def test_no_more_blocks_than_declared(kind: str, tmp_path: Path) -> None:
    way = checkpoint(tmp_path, kind)
    found = peak_of(way, 1 << 20)
    print(kind, found, way.memory_cost.scratch_blocks)
    assert found <= way.memory_cost.scratch_blocks + SLACK


@pytest.mark.parametrize("double_quant", [True, False])
def test_simulated(double_quant: bool, tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    way = FakeQuantizedTensor(opened(tmp_path, {"w": weight}).tensors["w"], double_quant)
    found = peak_of(way, 1 << 20)
    print("simulated", found, way.memory_cost.scratch_blocks)
    assert found <= way.memory_cost.scratch_blocks + SLACK


def test_experts(tmp_path: Path) -> None:
    """One tile is a few rows of an expert: what is staged is their share of the bytes, not the expert."""
    blocks_, scales = torch.zeros(4, 512, 18, 16, dtype=torch.uint8), torch.zeros(4, 512, 18, dtype=torch.uint8)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    way = opened(tmp_path, {"e.up_blocks": blocks_, "e.up_scales": scales}, config).tensors["e.up"]
    found = peak_of(way, 1)
    print("mxfp4", found, way.memory_cost.scratch_blocks)
    assert found <= way.memory_cost.scratch_blocks + SLACK
    assert way.memory_cost.row_nbytes == 512 * 17 // 32
