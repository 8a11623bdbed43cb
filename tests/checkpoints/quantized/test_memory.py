"""The memory_cost of quantized tensors: staged bytes, and blocks that exist at once."""

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
from mergeforge.tensors.lazy import LazyTensor, StatsPass, collect_stats
from mergeforge.tensors.worker import Worker

SHAPE = (1024, 1088)  # two blocks of 480 rows and a smaller one
SLACK = 0.25  # of a block: tables, scales of a few rows


class Peak(TorchDispatchMode):
    """Measures the peak number of bytes of tensors created inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def peak_of(tensor: LazyTensor, rows: int) -> float:
    """The number of float32 blocks that exist at once while tiles of `rows` rows are computed."""
    info = tensor.info
    tiles = [range(tile.start, tile.stop) for tile in split_into_tiles(info, rows)]
    block_nbytes = 4 * info.block_rows * info.columns
    staging = max(map(len, tiles)) * tensor.memory_cost.row_nbytes + tensor.memory_cost.fixed_nbytes
    with torch.inference_mode():
        worker = Worker("cpu", staging)
        stats = collect_stats(tensor, StatsPass(info, tiles, worker, {}, torch.float32))
        with Peak() as measured:
            for tile in tiles:
                worker.clear()
                value = tensor.load(tile, worker, stats, torch.float32)
                for start, stop in blocks(split_into_tiles(info, rows)[tiles.index(tile)], info):
                    value(start, stop)
    return measured.peak / block_nbytes


def checkpoint(folder: Path, kind: str) -> LazyTensor:
    stored, _, settings = FORMATS[kind](torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16())
    tensors = {f"m.{leaf}": value for leaf, value in stored.items()}
    return opened(folder, tensors, {"quantization_config": settings, "dtype": "bfloat16"}).tensors["m.weight"]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_need_no_more_scratch_blocks_than_declared(kind: str, tmp_path: Path) -> None:
    tensor = checkpoint(tmp_path, kind)
    peak = peak_of(tensor, 1 << 20)
    assert peak <= tensor.memory_cost.scratch_blocks + SLACK


@pytest.mark.parametrize("double_quant", [True, False])
def test_fake_nf4_needs_no_more_scratch_blocks_than_declared(double_quant: bool, tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = FakeQuantizedTensor(opened(tmp_path, {"w": weight}).tensors["w"], double_quant)
    peak = peak_of(tensor, 1 << 20)
    assert peak <= tensor.memory_cost.scratch_blocks + SLACK


def test_experts_stage_only_the_rows_of_a_tile(tmp_path: Path) -> None:
    """A tile is a few rows of an expert; only their share of its bytes is staged."""
    blocks_, scales = torch.zeros(4, 512, 18, 16, dtype=torch.uint8), torch.zeros(4, 512, 18, dtype=torch.uint8)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    tensor = opened(tmp_path, {"e.up_blocks": blocks_, "e.up_scales": scales}, config).tensors["e.up"]
    peak = peak_of(tensor, 1)
    assert peak <= tensor.memory_cost.scratch_blocks + SLACK
    assert tensor.memory_cost.row_nbytes == 512 * 17 // 32
