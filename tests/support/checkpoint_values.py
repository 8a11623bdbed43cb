"""Checkpoints of given tensors, opened; and every value of a way, computed as a merge computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.core.tensor_info import blocks, split_into_tiles, torch_dtype
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.lazy import StatsPass, LazyTensor, collect_stats

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def write_shards(folder: Path, shards: list[Tensors], config: dict[str, Any]) -> Path:
    """A checkpoint of several files and their index."""
    folder.mkdir()
    names = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Checkpoint:
    return open_checkpoint(write(folder, tensors, config), "the model")


def values(way: LazyTensor, rows: int = 1 << 30) -> torch.Tensor:
    """All of a way in its dtype, in tiles of at most `rows` rows, in exactly the memory that its need declares."""
    info = way.info
    pieces = []
    tiles = split_into_tiles(info, rows)
    highest = max(tile.rows for tile in tiles)
    worker = Worker("cpu", highest * way.memory_cost.row_nbytes + way.memory_cost.fixed_nbytes)
    with torch.inference_mode():
        scan = StatsPass(info, [range(tile.start, tile.stop) for tile in tiles], worker, {}, torch.float32)
        worker.clear()
        facts = collect_stats(way, scan)
        for tile in tiles:
            worker.reset_scratch() if len(tiles) == 1 else worker.clear()
            block = way.load(range(tile.start, tile.stop), worker, facts, torch.float32)
            for start, stop in blocks(tile, info):
                pieces.append(block(start, stop).clone())
    return torch.cat(pieces).view(info.shape).to(torch_dtype(info.dtype))
