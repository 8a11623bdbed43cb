"""A GGUF file alone as a checkpoint: names, config and tokenizer files are rebuilt from its keys and tensors."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.gguf_checkpoint import dequantized
from mergeforge.core.tensor_info import DTYPES, TensorInfo
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.hf_model.config import generation_config
from mergeforge.gguf.hf_model.old_files import source_of
from mergeforge.gguf.hf_model.rebuild import rebuild_model
from mergeforge.gguf.hf_tokenizer import rebuild_tokenizer
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo, read_gguf
from mergeforge.io.aux_files import AuxFile, InMemoryFile
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

_PLAIN = ("F32", "F16", "BF16")  # kept; all other types become F16


def open_gguf_model(path: Path, label: str) -> Checkpoint:
    """Open a GGUF file as the Hugging Face model that it holds. Reads headers and tables of rope factors only.

    Raises SourceError for a file that is not a whole model of a known architecture with a known vocabulary.
    """
    header = read_gguf(path)
    _check_is_model(header, path)
    dtype = _most_common_dtype(header)
    model = rebuild_model(header, path, DTYPES[dtype][1])
    tokenizer, notes = rebuild_tokenizer(header, path)
    files: dict[str, AuxFile] = {name: InMemoryFile(name, content) for name, content in tokenizer.items()}
    tokens = json.dumps(generation_config(model.config), indent=2) + "\n"
    files["generation_config.json"] = InMemoryFile("generation_config.json", tokens.encode())
    tensors: dict[str, Any] = {
        name: _tensor(info, model.spec.targets[name], header.tensors) for name, info in model.tensors.items()
    }
    all_notes = (*_quantized_note(header, label), *model.notes, *notes)
    return Checkpoint(
        label, path.parent, None, tensors, model.config, header.hashes, all_notes, is_single_file=True, own_files=files
    )


def _check_is_model(header: GGUFHeader, path: Path) -> None:
    kind, arch = header.get("general.type"), header.get("general.architecture")
    if kind in ("adapter", "imatrix"):
        hint = "list it under `adapters`" if kind == "adapter" else "name it as --imatrix"
        raise SourceError(f"{path} is an {kind}, not a model", hint=hint)
    if kind == "mmproj" or arch == "clip":
        raise SourceError(f"{path} is an mmproj file: a tower without its text model", hint="give the model's own file")
    if not header.tensors:
        raise SourceError(f"{path} holds no tensors, only a vocabulary", hint="give a model's GGUF file")


def _tensor(info: TensorInfo, targets: tuple[TensorTarget, ...], stored: Mapping[str, GGUFTensorInfo]) -> LazyTensor:
    sources = [source_of(target, stored) for target in targets]
    dtype = _common_dtype({source.ggml_type for _, source in sources})
    info = info.with_dtype(dtype)
    if len(sources) == 1 and _is_copy(info, *sources[0]):
        target, source = sources[0]
        return StoredTensor(info, source.file, source.offset + source.row_nbytes(target.first_element))
    return dequantized(info, sources, dtype)


def _is_copy(info: TensorInfo, target: TensorTarget, stored: GGUFTensorInfo) -> bool:
    """Whether the bytes of the tensor are in the file as they are."""
    changed = target.rows is not None or target.add or not target.keeps_rows
    return stored.ggml_type == info.dtype and not changed


def _common_dtype(types: set[str]) -> str:
    """The dtype that holds the values of all these ggml types; 16 bits for quantized ones."""
    dtypes = {kind if kind in _PLAIN else "F16" for kind in types}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _most_common_dtype(header: GGUFHeader) -> str:
    """The dtype of most of the model's elements."""
    sizes: Counter[str] = Counter()
    for stored in header.tensors.values():
        sizes[_common_dtype({stored.ggml_type})] += math.prod(stored.shape)
    return sizes.most_common(1)[0][0]


def _quantized_note(header: GGUFHeader, label: str) -> list[str]:
    types = Counter(stored.ggml_type for stored in header.tensors.values() if stored.ggml_type not in _PLAIN)
    if not types:
        return []
    return [
        f"{label} is quantized ({', '.join(sorted(types))}): the weights are as exact as the file, not as its source"
    ]
