"""A llama.cpp LoRA adapter (a GGUF file), matched to the checkpoint that it is folded into.

convert_lora_to_gguf.py defines the file: `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r) under the
GGUF name of the weight, whose rows stand in GGUF's order, and the scale adapter.lora.alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergeforge.adapters.deltas import LoraDelta
from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.checkpoint import Checkpoint, ModelSource
from mergeforge.core.tensor_info import FLOATS, TensorInfo
from mergeforge.errors import SourceError, listing
from mergeforge.gguf.architectures import TensorTarget, build_spec
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo, read_gguf
from mergeforge.tensors.stored import StoredTensor


def open_gguf_adapter(path: Path, label: str, base: ModelSource) -> Adapter:
    """Read an adapter's header and match every pair of factors to the base.

    Raises SourceError when it is no LoRA, or a tensor matches nothing.
    """
    header = read_gguf(path)
    if header.get("general.type") != "adapter" or header.get("adapter.type") != "lora":
        raise SourceError(f"{path} is not a LoRA adapter", hint="a GGUF model goes under models")
    if header.get("adapter.alora.invocation_tokens"):
        raise SourceError(f"{path} applies only after certain tokens: it cannot be merged")
    spelling = build_spec(base.config, {name: stored.info for name, stored in base.tensors.items()})
    if header.get("general.architecture") != spelling.arch:
        text = f"{path} belongs to a {header.get('general.architecture')}; {base.label} would be a {spelling.arch}"
        raise SourceError(text, hint="fold it into the model that it was trained on")
    homes = _homes(spelling.targets)
    names = sorted({name.removesuffix(".lora_a").removesuffix(".lora_b") for name in header.tensors})
    if strangers := [name for name in names if name not in homes]:
        raise SourceError(f"{path} changes {listing(strangers)}, which {base.label} has not, or holds fused")
    edits: dict[str, tuple[LoraDelta]] = {}
    stored: dict[str, StoredTensor] = {}
    for name in names:
        tensor, place = homes[name]
        edit = _pair(header, name, base.tensors[tensor].info, place, path)
        edits[tensor] = (edit,)
        stored |= {f"{name}.lora_a": edit.right, f"{name}.lora_b": edit.left}
    table = Checkpoint(label, path, None, stored, {}, header.hashes)
    return Adapter(label, path, None, edits, {}, {}, True, (table,), ())


def _homes(places: Mapping[str, tuple[TensorTarget, ...]]) -> dict[str, tuple[str, TensorTarget]]:
    """GGUF name -> the tensor that alone becomes it, row by row."""
    return {
        some[0].tensor: (name, some[0])
        for name, some in places.items()
        if len(some) == 1 and not some[0].turn and not some[0].first and len(some[0].shape) == 2
    }


def _pair(header: GGUFHeader, name: str, target: TensorInfo, place: TensorTarget, path: Path) -> LoraDelta:
    import numpy as np

    a, b = (header.tensors.get(f"{name}.lora_{which}") for which in "ab")
    if a is None or b is None:
        raise SourceError(f"{path} lacks one of the factors of {name}")
    if a.shape[1:] != target.shape[1:] or b.shape != (target.rows, a.shape[0]):
        text = f"{path}: {name} has factors {list(b.shape)} and {list(a.shape)}; {target.name} is {list(target.shape)}"
        raise SourceError(text, hint="fold it into the model that it was trained on")
    order = None
    if place.rows is not None:
        order = np.empty(target.rows, dtype=np.int64)
        order[place.rows] = np.arange(target.rows)
    scale = float(header.get("adapter.lora.alpha") or a.shape[0]) / a.shape[0]
    return LoraDelta(_factor(b, path), _factor(a, path), False, scale, order)


def _factor(held: GGUFTensorInfo, path: Path) -> StoredTensor:
    if held.kind not in FLOATS:
        raise SourceError(f"{path}: {held.name} is {held.kind}", hint="convert the adapter to f16 or f32")
    return StoredTensor(TensorInfo(held.name, held.kind, held.shape), held.file, held.offset)
