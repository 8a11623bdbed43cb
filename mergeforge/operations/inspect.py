"""What is in a checkpoint, an adapter or a GGUF; and how two checkpoints differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.adapters.peft.describe import explain
from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_json
from mergeforge.checkpoints.gguf_checkpoint import DequantizedGGUFTensor, open_gguf, open_gguf_alone
from mergeforge.core.tensor_info import TensorInfo, blocks, split_into_tiles
from mergeforge.gguf.reader import read_gguf
from mergeforge.hub.download import fetch
from mergeforge.io.safetensors_header import read_header
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.stored import StoredTensor

TILE_NBYTES = 16 << 20
_FACTS = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "max_position_embeddings",
]
_ADAPTER_FACTS = [
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "init_lora_weights",
    "peft_version",
]


def inspect(path: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Kind, config facts, tensors by dtype and every tensor's dtype, shape and bytes; headers only.

    Raises SourceError when the path is none of a checkpoint, an adapter or a GGUF.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".gguf":
        return _inspect_gguf(local)
    if local.is_file() and local.suffix == ".safetensors":
        header = read_header(local)
        return _described("safetensors file", [info for info, _ in header.tensors.values()], dict(header.metadata))
    folder = fetch(path, None, ("model", "adapter_model"), allow_pickle=allow_pickle).path
    is_adapter = (folder / "adapter_config.json").is_file() if folder.is_dir() else False
    stem, kind, facts = ("adapter_model", "adapter", _ADAPTER_FACTS) if is_adapter else ("model", "checkpoint", _FACTS)
    table = open_checkpoint(folder, path, allow_pickle=allow_pickle, stem=stem)
    config = read_json(folder / "adapter_config.json") if is_adapter else dict(table.config)
    shown = {name: config[name] for name in facts if config.get(name) not in (None, {}, [])}
    infos = [stored.info for stored in table.tensors.values()]
    told = {"in_words": explain(config, infos)} if is_adapter else {}
    return _described(kind, infos, shown) | told


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints. `relative` is |A - B| / |A| in float64, Frobenius norms."""

    name: str
    what: str
    relative: float = 0.0
    largest: float = 0.0

    @property
    def same(self) -> bool:
        return self.what == "same"


def differences(a: str, b: str, *, allow_pickle: bool = False) -> Iterator[Difference]:
    """Compare two checkpoints (folders or GGUF files) tensor by tensor, streaming.

    A GGUF file is compared with a folder under the folder's names; two GGUF files under theirs.
    """
    first, second = _tables(a, b, allow_pickle)
    worker = Worker("cpu", 2 * TILE_NBYTES + (64 << 20))
    for name in sorted({*first.tensors, *second.tensors}):
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            yield Difference(name, f"only in {b if one is None else a}")
        elif one.info.shape != two.info.shape:
            yield Difference(name, f"shape {list(one.info.shape)} and {list(two.info.shape)}")
        else:
            yield _compared(one, two, worker)


def _tables(a: str, b: str, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint]:
    if _is_gguf(a) and _is_gguf(b):
        return open_gguf_alone(Path(a).expanduser(), a), open_gguf_alone(Path(b).expanduser(), b)
    if _is_gguf(a) or _is_gguf(b):
        plain = _table(b if _is_gguf(a) else a, allow_pickle)
        other = open_gguf(Path(a if _is_gguf(a) else b).expanduser(), a if _is_gguf(a) else b, plain)
        return (other, plain) if _is_gguf(a) else (plain, other)
    return _table(a, allow_pickle), _table(b, allow_pickle)


def _is_gguf(path: str) -> bool:
    return path.endswith(".gguf") and Path(path).expanduser().is_file()


def _table(path: str, allow_pickle: bool) -> Checkpoint:
    folder = fetch(path, None, ("model", "adapter_model"), allow_pickle=allow_pickle).path
    is_adapter = folder.is_dir() and (folder / "adapter_config.json").is_file()
    return open_checkpoint(folder, path, allow_pickle=allow_pickle, stem="adapter_model" if is_adapter else "model")


def _compared(
    one: StoredTensor | DequantizedGGUFTensor, two: StoredTensor | DequantizedGGUFTensor, worker: Worker
) -> Difference:
    import torch

    if (
        isinstance(one, StoredTensor)
        and isinstance(two, StoredTensor)
        and not (one.info.is_float and two.info.is_float)
    ):
        return _compared_bytes(one, two, worker)
    squares = base = largest = 0.0
    widest = max(one.info.row_nbytes, two.info.row_nbytes, 1)
    for tile in split_into_tiles(one.info, max(1, TILE_NBYTES // widest)):
        worker.clear()
        rows = range(tile.start, tile.stop)
        left = one.load(rows, worker, {}, torch.float64)
        right = two.load(rows, worker, {}, torch.float64)
        for start, stop in blocks(tile, one.info):
            x, y = left(start, stop), right(start, stop)
            base += float(x.square().sum())
            y.sub_(x)
            squares += float(y.square().sum())
            largest = max(largest, float(y.abs().max()))
    relative = math.sqrt(squares / base) if base else math.inf if squares else 0.0
    alike = (
        one.info.dtype == two.info.dtype
        or isinstance(one, DequantizedGGUFTensor)
        or isinstance(two, DequantizedGGUFTensor)
    )
    dtypes = "" if alike else f"dtype {one.info.dtype} and {two.info.dtype}"
    what = dtypes or ("same" if squares == 0 else "values differ")
    return Difference(one.info.name, what, relative, largest)


def _compared_bytes(one: StoredTensor, two: StoredTensor, worker: Worker) -> Difference:
    if one.info.dtype != two.info.dtype:
        return Difference(one.info.name, f"dtype {one.info.dtype} and {two.info.dtype}")
    for at in range(0, one.info.nbytes, TILE_NBYTES):
        worker.clear()
        size = min(TILE_NBYTES, one.info.nbytes - at)
        if not bool(
            (worker.read(one.file, one.offset + at, size) == worker.read(two.file, two.offset + at, size)).all()
        ):
            return Difference(one.info.name, "bytes differ", math.nan, math.nan)
    return Difference(one.info.name, "same")


def _described(kind: str, tensors: list[TensorInfo], config: dict[str, Any]) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for info in tensors:
        sizes[info.dtype] += info.nbytes
    return {
        "kind": kind,
        "config": config,
        "parameters": sum(info.numel for info in tensors),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in tensors
        ],
    }


def _inspect_gguf(path: Path) -> dict[str, Any]:
    header = read_gguf(path)
    tensors: list[dict[str, Any]] = [
        {"name": one.name, "dtype": one.kind, "shape": list(one.shape), "bytes": one.nbytes}
        for one in header.tensors.values()
    ]
    sizes: Counter[str] = Counter()
    for one in tensors:
        sizes[one["dtype"]] += one["bytes"]
    return {
        "kind": "GGUF",
        "config": {name: _shown(value.value) for name, value in header.keys.items()},
        "parameters": sum(math.prod(one["shape"]) for one in tensors),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
        "tensors": tensors,
    }


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return f"{len(value)} values" if len(value) > 8 else list(value)
    return value
