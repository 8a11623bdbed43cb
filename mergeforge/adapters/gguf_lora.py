"""Match a llama.cpp LoRA adapter (a GGUF file) to the checkpoint that it is folded into.

The format is that of convert_lora_to_gguf.py: `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r) under the weight's
GGUF name, with its rows in GGUF's order; the scale is adapter.lora.alpha / r. Of an embedding, lora_a is
(vocabulary, r), because llama.cpp gathers the rows of tokens (build_inp_embd).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergeforge.adapters.deltas import LoraDelta
from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import EMBEDDINGS
from mergeforge.checkpoints.ties import model_ties
from mergeforge.core.tensor_info import FLOATS, TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.architectures import TensorTarget, build_spec
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo, read_gguf
from mergeforge.tensors.stored import StoredTensor


def open_gguf_adapter(path: Path, label: str, base: ModelSource) -> Adapter:
    """Read an adapter's header and match every pair of factors to the base.

    Raises SourceError if it is not a LoRA adapter, or a tensor does not match the base.
    """
    header = _read_lora(path)
    spec = build_spec(base.config, {name: stored.info for name, stored in base.tensors.items()})
    if header.get("general.architecture") != spec.arch:
        arch = header.get("general.architecture")
        text = f"{path} is for the architecture {arch}, but {base.label} is {spec.arch}"
        raise SourceError(text, hint="fold it into the model that it was trained on")
    targets = _lora_targets(spec.targets)
    names = sorted({name.removesuffix(".lora_a").removesuffix(".lora_b") for name in header.tensors})
    if unmatched := [name for name in names if name not in targets]:
        raise SourceError(f"{path} changes {format_list(unmatched)}, which {base.label} does not have, or stores fused")
    ties = model_ties(base)
    deltas: dict[str, tuple[LoraDelta]] = {}
    stored: dict[str, StoredTensor] = {}
    for name in names:
        tensor, row_target = targets[name]
        delta = _lora_delta(header, name, base.tensors[tensor].info, row_target, path)
        deltas[tensor] = (delta,)
        stored |= {f"{name}.lora_a": delta.right, f"{name}.lora_b": delta.left}
    checkpoint = Checkpoint(label, path, None, stored, {}, header.hashes)
    touched = [ties.of(name) for name in deltas]
    breaks_ties = any(tie and not set(tie.names) <= deltas.keys() for tie in touched)  # as PEFT does: not the tied head
    return Adapter(label, path, None, deltas, {}, {}, breaks_ties, (checkpoint,), ())


def match_gguf_adapter(path: Path, label: str, base: GGUFHeader) -> Adapter:
    """Match an adapter to a GGUF file, whose tensors have the adapter's names and row order.

    Raises SourceError if it is not a LoRA adapter of a model of this architecture, or a tensor does not match.
    """
    header = _read_lora(path)
    arch = header.get("general.architecture")
    if arch != base.get("general.architecture"):
        text = f"{path} is for the architecture {arch}, but the model is {base.get('general.architecture')}"
        raise SourceError(text, hint="fold it into the model that it was trained on")
    deltas: dict[str, tuple[LoraDelta]] = {}
    stored: dict[str, StoredTensor] = {}
    for name in sorted({name.removesuffix(".lora_a").removesuffix(".lora_b") for name in header.tensors}):
        if name not in base.tensors or len(base.tensors[name].shape) != 2:
            raise SourceError(f"{path} changes {name}, which the model does not have, or has as a stack of experts")
        hf_name = "embed_tokens.weight" if name == "token_embd.weight" else name  # the name tells how it is stored
        target = TensorInfo(hf_name, "F32", base.tensors[name].shape)
        delta = _lora_delta(header, name, target, TensorTarget(name, target.shape), path)
        deltas[name] = (delta,)
        stored |= {f"{name}.lora_a": delta.right, f"{name}.lora_b": delta.left}
    checkpoint = Checkpoint(label, path.parent, None, stored, {}, header.hashes)
    return Adapter(label, path, None, deltas, {}, {}, False, (checkpoint,), ())


def _read_lora(path: Path) -> GGUFHeader:
    """The header of an adapter. Raises SourceError for any other file."""
    header = read_gguf(path)
    if header.get("general.type") != "adapter" or header.get("adapter.type") != "lora":
        raise SourceError(f"{path} is not a LoRA adapter", hint="list a GGUF model under models")
    if header.get("adapter.alora.invocation_tokens"):
        raise SourceError(f"{path} is an activated LoRA: it applies only after certain tokens, so it cannot be merged")
    return header


def _lora_targets(targets: Mapping[str, tuple[TensorTarget, ...]]) -> dict[str, tuple[str, TensorTarget]]:
    """GGUF name -> the checkpoint's tensor that is converted to it alone, row by row."""
    return {
        tensor_targets[0].tensor: (name, tensor_targets[0])
        for name, tensor_targets in targets.items()
        if len(tensor_targets) == 1
        and tensor_targets[0].keeps_rows
        and not tensor_targets[0].first_row
        and len(tensor_targets[0].shape) == 2
    }


def _lora_delta(header: GGUFHeader, name: str, target: TensorInfo, row_target: TensorTarget, path: Path) -> LoraDelta:
    import numpy as np

    a, b = (header.tensors.get(f"{name}.lora_{which}") for which in "ab")
    if a is None or b is None:
        raise SourceError(f"{path} has only one of the two factors of {name}")
    module = target.name.removesuffix(".weight")
    alpha = header.get("adapter.lora.alpha")
    if (
        module.rpartition(".")[2] in EMBEDDINGS
        and (a.shape[0], b.shape[0]) == target.shape
        and a.shape[1:] == b.shape[1:]
    ):
        left, right = (
            _factor(factor, f"{module}.lora_embedding_{which}", path) for factor, which in ((a, "A"), (b, "B"))
        )
        return LoraDelta(left, right, False, float(alpha or a.shape[1]) / a.shape[1], right_transposed=True)
    if a.shape[1:] != target.shape[1:] or b.shape != (target.rows, a.shape[0]):
        factors = f"{list(b.shape)} and {list(a.shape)}"
        text = f"{path}: {name} has factors of shapes {factors}, but {target.name} is {list(target.shape)}"
        raise SourceError(text, hint="fold it into the model that it was trained on")
    order = None
    if row_target.rows is not None:
        order = np.empty(target.rows, dtype=np.int64)
        order[row_target.rows] = np.arange(target.rows)
    left, right = (_factor(factor, f"{module}.lora_{which}.weight", path) for factor, which in ((b, "B"), (a, "A")))
    return LoraDelta(left, right, False, float(alpha or a.shape[0]) / a.shape[0], order)


def _factor(tensor: GGUFTensorInfo, name: str, path: Path) -> StoredTensor:
    """A factor under the key that PEFT has for it."""
    if tensor.ggml_type not in FLOATS:
        raise SourceError(f"{path}: {tensor.name} is {tensor.ggml_type}", hint="convert the adapter to f16 or f32")
    return StoredTensor(TensorInfo(name, tensor.ggml_type, tensor.shape), tensor.file, tensor.offset)
