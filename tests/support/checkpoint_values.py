"""Write and open checkpoints of given tensors; compute all values of a LazyTensor as a merge does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.core.tensor_info import blocks, split_into_tiles, torch_dtype
from mergeforge.tensors.lazy import LazyTensor, StatsPass, collect_stats
from mergeforge.tensors.worker import Worker

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def write_shards(folder: Path, shards: list[Tensors], config: dict[str, Any]) -> Path:
    """Write a checkpoint of several files and their index."""
    folder.mkdir()
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Checkpoint:
    return open_checkpoint(write(folder, tensors, config), "the model")


def values(tensor: LazyTensor, rows: int = 1 << 30) -> torch.Tensor:
    """Compute a tensor in tiles of at most `rows` rows, in exactly the memory that its memory_cost declares."""
    info = tensor.info
    computed = []
    tiles = split_into_tiles(info, rows)
    highest = max(tile.rows for tile in tiles)
    worker = Worker("cpu", highest * tensor.memory_cost.row_nbytes + tensor.memory_cost.fixed_nbytes)
    with torch.inference_mode():
        scan = StatsPass(info, [range(tile.start, tile.stop) for tile in tiles], worker, {}, torch.float32)
        worker.clear()
        stats = collect_stats(tensor, scan)
        for tile in tiles:
            worker.reset_scratch() if len(tiles) == 1 else worker.clear()
            block = tensor.load(range(tile.start, tile.stop), worker, stats, torch.float32)
            for start, stop in blocks(tile, info):
                computed.append(block(start, stop).clone())
    return torch.cat(computed).view(info.shape).to(torch_dtype(info.dtype))
