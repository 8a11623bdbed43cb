"""What a checkpoint, an adapter or a GGUF file holds, from headers and config only."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergeforge.adapters.peft.describe import describe_adapter
from mergeforge.checkpoints.checkpoint import open_checkpoint, read_json
from mergeforge.checkpoints.quantized.detect import detect_quantization
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.hf_model.rebuild import rebuild_model
from mergeforge.gguf.hf_tokenizer import rebuild_tokenizer
from mergeforge.gguf.reader import GGUFHeader, read_gguf
from mergeforge.hub.download import fetch
from mergeforge.io.safetensors_header import read_header
from mergeforge.planner import WORK

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

_TEXT = (".json", ".md", ".txt", ".jinja", ".py", ".html")


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
    if local.is_file():
        _refuse_other_files(local, path)
    folder = fetch(path, None, ("model", "adapter_model"), allow_pickle=allow_pickle).path
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        checkpoint = open_checkpoint(folder, path, allow_pickle=allow_pickle, stem="adapter_model")
        config = read_json(folder / "adapter_config.json")
        infos = [tensor.info for tensor in checkpoint.tensors.values()]
        summary = _summary("adapter", infos, _present(config, _ADAPTER_KEYS))
        return summary | {"in_words": describe_adapter(config, infos)}
    _refuse_other_folders(folder, path)
    return _inspect_checkpoint(folder, path, allow_pickle)


def _inspect_checkpoint(folder: Path, path: str, allow_pickle: bool) -> dict[str, Any]:
    """The tensors as they are stored; of a quantized model also what they are read as."""
    stored = open_checkpoint(folder, path, allow_pickle=allow_pickle, stem="model", dequantize=False)
    infos = [tensor.info for tensor in stored.tensors.values()]
    summary = _summary("checkpoint", infos, _present(stored.config, [*_MODEL_KEYS, "quantization_config"]))
    try:
        tensors, *_ = detect_quantization(path, stored.tensors, stored.config)
    except SourceError as error:
        return summary | {"in_words": [f"mergeforge cannot read its weights: {error}"]}
    quantized = [tensor for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)]
    if not quantized:
        return summary
    labels = Counter((tensor.layout.label, tensor.info.dtype) for tensor in quantized)
    sentences = [
        f"{count} weights are stored as {label}; a merge reads them as {dtype}"
        for (label, dtype), count in labels.items()
    ]
    return summary | {"parameters": sum(tensor.info.numel for tensor in tensors.values()), "in_words": sentences}


def _refuse_other_files(local: Path, path: str) -> None:
    """Raise SourceError for a file that holds no tensors, naming what it is."""
    if local.suffix.lower() in (".yaml", ".yml"):
        hint = f"`mergeforge plan {shlex.quote(path)}` shows what it would do"
        raise SourceError(f"{path} is a recipe or another YAML file: it holds no tensors", hint=hint)
    if local.suffix.lower() in _TEXT:
        raise SourceError(f"{path} holds no tensors", hint="name the folder of the model or adapter")


def _refuse_other_folders(folder: Path, path: str) -> None:
    """Raise SourceError for a folder whose only weights are GGUF files, or that an interrupted merge has left."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return
    if ggufs := sorted(file.name for file in folder.glob("*.gguf")):
        command = f"`mergeforge inspect {shlex.quote(str(Path(path) / ggufs[0]))}`"
        raise SourceError(f"{path} holds only GGUF files: {format_list(ggufs)}", hint=f"name one of them: {command}")
    if (folder / WORK).is_dir():
        hint = "run the command that started it again to resume"
        raise SourceError(f"{path} holds an interrupted merge, and no finished model", hint=hint)


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
        "in_words": list(_gguf_sentences(header, path)),
        "config": {name: _abridged(value.value) for name, value in header.keys.items()},
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
        "tensors": tensors,
    }


def _gguf_sentences(header: GGUFHeader, path: Path) -> Iterator[str]:
    """What the file is, and whether it can be turned back into a Hugging Face model."""
    if len(header.hashes) > 1:
        yield f"the model is split into {len(header.hashes)} files"
    if header.get("general.type") not in (None, "model") or not header.tensors:
        return
    try:
        model = rebuild_model(header, path)
        rebuild_tokenizer(header, path)
    except SourceError as error:
        yield f"`mergeforge convert` cannot write it as safetensors: {error}"
        return
    name, tokens = model.config["architectures"][0], header.get("tokenizer.ggml.tokens") or ()
    yield f"it holds a {name} with {len(model.tensors)} tensors and {len(tokens)} tokens"
    yield f"`mergeforge convert {shlex.quote(str(path))} --out FOLDER` writes it as safetensors"


def _abridged(value: Any) -> Any:
    if isinstance(value, tuple):
        return f"{len(value)} values" if len(value) > 8 else list(value)
    return value
