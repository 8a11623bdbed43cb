"""A GGUF file of a Llama model as a Hugging Face folder: config.json, safetensors in bf16, and the tokenizer.

Weights are dequantized, so the folder is as good as the file, not as good as the model that the file was made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.gguf_checkpoint import open_gguf
from mergeforge.core.tensor_info import TensorInfo, blocks, split_into_tiles
from mergeforge.errors import SourceError
from mergeforge.gguf.reader import GGUFHeader, read_gguf
from mergeforge.gguf.vocab.to_tokenizer_json import special_token_ids, write_tokenizer_files
from mergeforge.io.disk import WriteBehind
from mergeforge.io.file_layout import OutputFiles
from mergeforge.operations.synthetic_models import ModelShape
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import Worker
from mergeforge.writers.safetensors import INDEX, index_content, lay_out

ARCHITECTURE, DTYPE = "llama", "BF16"
TILE_NBYTES, STAGING_NBYTES, SHARD_NBYTES = 32 << 20, 128 << 20, 5 * 10**9


def unpack_gguf(path: Path, folder: Path) -> Path:
    """Write the folder; config.json comes last, so that a folder with one is complete.

    Raises SourceError for a file of another architecture, or whose tokenizer cannot be written as tokenizer.json.
    """
    header = read_gguf(path)
    config, shape = _config(header, path), _shape(header)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_files(header, folder)
    _write_tensors(open_gguf(path, str(path), _reference(path, config, shape)), shape.tensors(DTYPE), folder)
    generation = {name: token for name, token in config.items() if name.endswith("_token_id")}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)
    return folder


def _shape(header: GGUFHeader) -> ModelShape:
    heads = header.get(f"{ARCHITECTURE}.attention.head_count")
    return ModelShape(
        header.get(f"{ARCHITECTURE}.embedding_length"),
        header.get(f"{ARCHITECTURE}.feed_forward_length"),
        header.get(f"{ARCHITECTURE}.block_count"),
        heads,
        header.get(f"{ARCHITECTURE}.attention.head_count_kv") or heads,
        header.tensors["token_embd.weight"].shape[0],
        tied="output.weight" not in header.tensors,
    )


def _config(header: GGUFHeader, path: Path) -> dict[str, Any]:
    """config.json. Raises SourceError for what a plain Llama does not have."""
    arch = header.get("general.architecture")
    known = {name for name in header.tensors if not name.startswith("blk.")}
    if arch != ARCHITECTURE or not known <= {"token_embd.weight", "output.weight", "output_norm.weight"}:
        text = f"{path} is not a plain Llama model (general.architecture: {arch})"
        raise SourceError(text, hint="use the folder of the model that the file was made from")
    shape = _shape(header)
    config = shape.config(DTYPE) | special_token_ids(header)
    config.pop("unk_token_id", None)
    config |= {"max_position_embeddings": header.get("llama.context_length")}
    config |= {"rms_norm_eps": _shortest(header.get("llama.attention.layer_norm_rms_epsilon"))}
    return config | {"rope_theta": _shortest(header.get("llama.rope.freq_base") or 10000.0)}


def _shortest(number: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 instead of 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(number)))


def _reference(path: Path, config: dict[str, Any], shape: ModelShape) -> Checkpoint:
    """Names and shapes of the folder's tensors, as open_gguf needs them."""
    file = next(iter(read_gguf(path).tensors.values())).file
    tensors = {info.name: StoredTensor(info, file, 0) for info in shape.tensors("F32")}
    return Checkpoint(str(path), path.parent, None, tensors, config, {})


def _write_tensors(checkpoint: Checkpoint, tensors: list[TensorInfo], folder: Path) -> None:
    import torch

    layout = lay_out(tensors, SHARD_NBYTES)
    files, worker, behind = OutputFiles(folder, layout.files), Worker("cpu", STAGING_NBYTES), WriteBehind()
    files.open()
    for info in tensors:
        extent = layout.extents[info.name]
        for start, values in _values(checkpoint, info, worker):
            encoded = values.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(-1).numpy()
            files.write(extent.file, encoded, extent.offset + start * info.row_nbytes, behind)
    files.sync()
    files.close()
    shards = index_content(layout, tensors)
    if shards is not None:
        (folder / INDEX).write_bytes(shards)


def _values(checkpoint: Checkpoint, info: TensorInfo, worker: Worker) -> Iterator[tuple[int, Any]]:
    """(first row, values) of every block of a tensor."""
    import torch

    tensor = checkpoint.tensors[info.name]
    for tile in split_into_tiles(info, max(1, TILE_NBYTES // info.row_nbytes)):
        worker.clear()
        load = tensor.load(range(tile.start, tile.stop), worker, {}, torch.float32)
        for start, stop in blocks(tile, info):
            yield start, load(start, stop)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
