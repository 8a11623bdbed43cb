"""What a checkpoint, an adapter or a GGUF file holds, from headers and config only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergeforge.adapters.peft.describe import describe_adapter
from mergeforge.checkpoints.checkpoint import open_checkpoint, read_json
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.reader import read_gguf
from mergeforge.hub.download import fetch
from mergeforge.io.safetensors_header import read_header

_MODEL_KEYS = [
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
_ADAPTER_KEYS = [
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
    """Kind, config, bytes by dtype, and every tensor's dtype, shape and size; reads headers only.

    Raises SourceError when the path is neither a checkpoint nor an adapter nor a GGUF file.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".gguf":
        return _inspect_gguf(local)
    if local.is_file() and local.suffix == ".safetensors":
        header = read_header(local)
        return _summary("safetensors file", [info for info, _ in header.tensors.values()], dict(header.metadata))
    folder = fetch(path, None, ("model", "adapter_model"), allow_pickle=allow_pickle).path
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        checkpoint = open_checkpoint(folder, path, allow_pickle=allow_pickle, stem="adapter_model")
        config = read_json(folder / "adapter_config.json")
        infos = [tensor.info for tensor in checkpoint.tensors.values()]
        summary = _summary("adapter", infos, _present(config, _ADAPTER_KEYS))
        return summary | {"in_words": describe_adapter(config, infos)}
    checkpoint = open_checkpoint(folder, path, allow_pickle=allow_pickle, stem="model")
    infos = [tensor.info for tensor in checkpoint.tensors.values()]
    return _summary("checkpoint", infos, _present(checkpoint.config, _MODEL_KEYS))


def _present(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: config[key] for key in keys if config.get(key) not in (None, {}, [])}


def _summary(kind: str, tensors: list[TensorInfo], config: dict[str, Any]) -> dict[str, Any]:
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
        {"name": info.name, "dtype": info.ggml_type, "shape": list(info.shape), "bytes": info.nbytes}
        for info in header.tensors.values()
    ]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor["dtype"]] += tensor["bytes"]
    return {
        "kind": "GGUF",
        "config": {name: _abridged(value.value) for name, value in header.keys.items()},
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
        "tensors": tensors,
    }


def _abridged(value: Any) -> Any:
    if isinstance(value, tuple):
        return f"{len(value)} values" if len(value) > 8 else list(value)
    return value
