"""A LoRA adapter as a GGUF file: its key/values, and the factors of every GGUF tensor.

The format is that of llama.cpp's convert_lora_to_gguf.py (see adapters/gguf_lora.py), and so are the bytes, with two
exceptions. llama.cpp scales every pair of factors by adapter.lora.alpha / r; where the adapter has another scale (rank
patterns, rsLoRA), lora_b is scaled here, and the script drops the difference. The script also swaps the factors of
GPT-2's transposed layers, so that they do not fit their tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import LoraDelta, ReplaceTensor, WeightDelta
from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.model import ModelSource
from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget, build_spec
from mergeforge.gguf.file_types import FileType, ModelHparams, select_tensor_types
from mergeforge.gguf.general_metadata import ParameterCounts, general_keys
from mergeforge.gguf.key_values import Keys, f32, string, u32
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.file_layout import Layout
from mergeforge.planner.gguf import EMBEDDING, QUANTIZATION_VERSION
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content
from mergeforge.writers.gguf import GGUFTensor, lay_out

if TYPE_CHECKING:
    from torch import Tensor

FOLD = "fold it into its base and write that as GGUF: a recipe with adapters and output.gguf"


@dataclass(frozen=True)
class LoraTensor:
    """A tensor of the file: its name, its shape, and what reads it, in float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class GGUFLoraPlan:
    """A LoRA file: its layout, and its tensors in the order of the file."""

    layout: Layout
    tensors: tuple[tuple[LoraTensor, GGUFTensor], ...]
    notes: tuple[str, ...]

    @property
    def file(self) -> str:
        return next(iter(self.layout.files))


def plan_gguf_lora(adapter: Adapter, base: ModelSource, name: str, file_type: FileType) -> GGUFLoraPlan:
    """Plan the file of an adapter. Raises SourceError for what a GGUF LoRA cannot hold.

    `name`: that of the adapter's folder. `file_type`: one of the converter's.
    """
    spec = build_spec(base.config, {key: stored.info for key, stored in base.tensors.items()})
    alpha = _alpha(adapter)
    tensors = [tensor for key, delta in _deltas(adapter, base) for tensor in _tensors(adapter, spec, key, delta, alpha)]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if len(shapes) < len(tensors):
        names = [tensor.name for tensor in tensors]
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise SourceError(f"{adapter.label} changes {repeated} more than once", hint=FOLD)
    types = select_tensor_types(file_type, shapes, ModelHparams(spec.arch, 0))
    keys = _keys(adapter, spec, name, alpha, shapes)
    outputs = [GGUFTensor(tensor.name, tensor.shape, types[tensor.name]) for tensor in tensors]
    layout = lay_out(f"{name}-{file_type.label}-LoRA", keys, outputs)
    notes = [*adapter.notes]
    if norms := [tensor.name for tensor in tensors if not tensor.name.endswith((".lora_a", ".lora_b"))]:
        notes.append(WarningText(f"llama.cpp ignores the {len(norms)} trained norms of {adapter.label}"))
    return GGUFLoraPlan(layout, tuple(zip(tensors, outputs, strict=True)), tuple(notes))


def gguf_deltas(adapter: Adapter, base: ModelSource) -> dict[str, tuple[WeightDelta, ...]]:
    """The changes of an adapter by GGUF name, for a GGUF file of its base. Raises SourceError as plan_gguf_lora()."""
    spec = build_spec(base.config, {key: stored.info for key, stored in base.tensors.items()})
    changes: dict[str, tuple[WeightDelta, ...]] = {}
    for name, delta in _deltas(adapter, base):
        if not isinstance(delta, LoraDelta):
            raise SourceError(f"{adapter.label}: {name} is {delta.label}, not LoRA", hint=FOLD)
        for target in _targets(adapter, spec, name):
            changes[target.tensor] = (*changes.get(target.tensor, ()), gguf_delta(adapter, name, delta, target))
    return changes


def _alpha(adapter: Adapter) -> float:
    """lora_alpha of the configuration, else the one that scales the first pair of factors."""
    path = adapter.folder / "adapter_config.json"
    alpha = read_json(path).get("lora_alpha") if path.is_file() else None
    if isinstance(alpha, int | float) and alpha > 0:
        return float(alpha)
    lora = [delta for deltas in adapter.deltas.values() for delta in deltas if isinstance(delta, LoraDelta)]
    return lora[0].scale * lora[0].rank if lora and lora[0].scale > 0 else 1.0


def _deltas(adapter: Adapter, base: ModelSource) -> list[tuple[str, WeightDelta]]:
    """The change of each tensor, in the order of the adapter's file. Raises SourceError for what cannot be stored."""
    resized = [name for name, value in adapter.resized.items() if not _is_base_weight(value, base.tensors.get(name))]
    if extra := [*resized, *adapter.added]:
        raise SourceError(f"{adapter.label} replaces {extra[0]}, which a GGUF LoRA cannot hold", hint=FOLD)
    found = []
    for name, deltas in adapter.deltas.items():
        is_norm = len(deltas) == 1 and isinstance(deltas[0], ReplaceTensor) and len(deltas[0].value.info.shape) == 1
        if len(deltas) != 1 or not (isinstance(deltas[0], LoraDelta) or (is_norm and "norm" in name)):
            kinds = " and ".join(delta.label for delta in deltas)
            raise SourceError(f"{adapter.label}: {name} has {kinds}, which a GGUF LoRA cannot hold", hint=FOLD)
        found.append((name, deltas[0]))
    return sorted(found, key=lambda item: _offset(item[1]))


def _is_base_weight(value: LazyTensor, base: LazyTensor | None) -> bool:
    """Whether a weight that the adapter has saved is the base's own, as PEFT saves the embeddings that it adapts."""
    return isinstance(value, StoredTensor) and isinstance(base, StoredTensor) and same_content(value, base)


def _offset(delta: WeightDelta) -> int:
    if isinstance(delta, LoraDelta):
        return min(delta.left.offset, delta.right.offset)
    assert isinstance(delta, ReplaceTensor)
    return delta.value.offset


def _tensors(
    adapter: Adapter, spec: GGUFModelSpec, name: str, delta: WeightDelta, alpha: float
) -> Iterator[LoraTensor]:
    """The tensors of one change: two factors, or a norm."""
    for target in _targets(adapter, spec, name):
        if isinstance(delta, ReplaceTensor):
            yield _norm(delta.value, target)
        else:
            assert isinstance(delta, LoraDelta)
            yield from _factors(adapter, name, delta, target, alpha)


def _targets(adapter: Adapter, spec: GGUFModelSpec, name: str) -> tuple[TensorTarget, ...]:
    """The GGUF tensors of a tensor that the adapter changes; none for a head that is tied to a changed embedding."""
    if name in spec.targets:
        return spec.targets[name]
    if _has_tied_twin(adapter, spec, name):
        return ()
    reason = spec.dropped.get(name, "")
    text = f"{adapter.label} changes {name}, which the GGUF file of its base lacks"
    raise SourceError(f"{text}: {reason}" if reason else text, hint=FOLD)


def _has_tied_twin(adapter: Adapter, spec: GGUFModelSpec, name: str) -> bool:
    """Whether a head that GGUF does not store is changed together with the embedding that it is tied to."""
    embeddings = [key for key, targets in spec.targets.items() if any(item.tensor == EMBEDDING for item in targets)]
    return not adapter.breaks_ties and name in spec.dropped and any(key in adapter.deltas for key in embeddings)


def _norm(value: StoredTensor, target: TensorTarget) -> LoraTensor:
    return LoraTensor(target.tensor, target.shape, lambda: value.read_float64().float() + target.add)


def gguf_delta(adapter: Adapter, name: str, delta: LoraDelta, target: TensorTarget) -> LoraDelta:
    """The change of a checkpoint's tensor as that of the GGUF tensor. Raises SourceError if it is no product of two."""
    is_embedding = target.tensor == EMBEDDING and target.rows is None
    is_conv1d = bool(target.transpose) and delta.transposed and target.rows is None and target.columns is None
    is_linear = not target.transpose and not delta.transposed and len(target.shape) == 2
    whole = not target.first_row and (target.rows is None or len(target.rows) == target.shape[0])
    if not (is_conv1d or is_linear or is_embedding) or not whole:
        text = (
            f"{adapter.label}: {name} is a part of {target.tensor}, or reshaped, so the factors of its LoRA are not two"
        )
        raise SourceError(text, hint=FOLD)
    if is_conv1d:
        return replace(delta, left=delta.right, right=delta.left, transposed=False)
    return delta if target.rows is None else replace(delta, row_order=target.rows)


def _factors(
    adapter: Adapter, name: str, change: LoraDelta, target: TensorTarget, alpha: float
) -> Iterator[LoraTensor]:
    """lora_a and lora_b of a GGUF tensor; of an embedding lora_a is (vocabulary, r), as llama.cpp gathers rows."""
    delta, (rows, columns) = gguf_delta(adapter, name, change, target), target.shape
    rank, factor = delta.rank, delta.scale * delta.rank / alpha
    is_embedding = target.tensor == EMBEDDING
    a, b = (delta.left, delta.right) if is_embedding else (delta.right, delta.left)
    flips_a, flips_b = is_embedding and delta.transposed, is_embedding and not delta.transposed

    def read_b() -> Tensor:
        import torch

        value = _read(b, transpose=flips_b) * _one(factor)
        return value if delta.row_order is None else value[torch.from_numpy(delta.row_order)]

    a_shape, b_shape = ((rows, rank), (columns, rank)) if is_embedding else ((rank, columns), (rows, rank))
    yield LoraTensor(f"{target.tensor}.lora_a", a_shape, lambda: _read(a, transpose=flips_a))
    yield LoraTensor(f"{target.tensor}.lora_b", b_shape, read_b)


def _one(factor: float) -> float:
    """1 where two scales are equal but for rounding, so that factors stay as they are."""
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def _read(stored: StoredTensor, *, transpose: bool) -> Tensor:
    value = stored.read_float64().float()
    return value.t().contiguous() if transpose else value


def _keys(adapter: Adapter, spec: GGUFModelSpec, name: str, alpha: float, shapes: Mapping[str, Any]) -> Keys:
    card = adapter.folder / MODEL_CARD
    files: AuxFiles = {MODEL_CARD: Path(card)} if card.is_file() else {}
    general = general_keys(files, {}, name, _counts(shapes))
    kind = {"general.architecture": string(spec.arch), "general.type": string("adapter")}
    last = {"adapter.lora.alpha": f32(alpha), "general.quantization_version": u32(QUANTIZATION_VERSION)}
    return kind | {"adapter.type": string("lora")} | dict(general) | last


def _counts(shapes: Mapping[str, tuple[int, ...]]) -> ParameterCounts:
    """The parameters of the weights that change; negative, as the converter marks that there are more."""
    total = 0
    for name, shape in shapes.items():
        if name.endswith(".lora_b"):
            total += math.prod(shape[:-1]) * shapes[name.removesuffix("b") + "a"][-1]
        elif not name.endswith(".lora_a"):
            total += math.prod(shape)
    return ParameterCounts(-total, total, 0, 0)
