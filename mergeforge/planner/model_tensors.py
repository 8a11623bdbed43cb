"""The tensors of one model as LazyTensors: its own adapters folded in, tied head and embedding resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import ReplaceRows, ReplaceTensor, WeightDelta
from mergeforge.adapters.resized_embedding import same_rows
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS, is_head, tied_head
from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.errors import SourceError, format_list
from mergeforge.planner.inputs import OpenAdapter, OpenModel
from mergeforge.recipe.parameter_values import layer_positions, value_at
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class ModelTensors:
    """One model's tensors by name.

    tied: the names of head and embedding while these are one tensor. untied: the same names once an adapter has made
    them two tensors. summaries, notes: what the model's own adapters did, in words.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    tied: tuple[str, str] | None
    untied: tuple[str, str] | None = None
    summaries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> LazyTensor | None:
        """The tensor of that name; a tied head is its embedding under another name."""
        if name in self.tensors:
            return self.tensors[name]
        if self.tied and name == self.tied[0]:
            return renamed_tensor(self.tensors[self.tied[1]], name)
        return None

    def deltas(self, opened: OpenAdapter, name: str) -> tuple[WeightDelta, ...]:
        """An adapter's deltas of a tensor; those of an embedding apply to its tied head too."""
        if self.untied and name == self.untied[0] and opened.adapter.keeps_tied:
            name = self.untied[1]
        return opened.adapter.deltas.get(name, ())


def model_tensors(model: OpenModel, later: Sequence[OpenAdapter] = (), numerics: str = "original") -> ModelTensors:
    """A model's tensors with its own adapters folded in. `later` adapters only decide shapes and tying.

    numerics: "dequant_nf4" (or "dequant_nf4_single") takes the tensors that adapters change as NF4 holds them, which is
    what QLoRA trained on.

    Raises SourceError when the adapters cannot be folded together.
    """
    opened = (*model.adapters, *later)
    checkpoint = model.checkpoint
    tensors: dict[str, LazyTensor] = dict(checkpoint.tensors)
    summaries = _apply_saved_modules(tensors, opened)
    tied, notes = _resolve_tying(tensors, checkpoint, opened)
    if numerics != "original":
        notes += _fake_quantize_adapted(tensors, checkpoint, opened, double_quant=numerics == "dequant_nf4")
    untied = None if tied else tied_head(checkpoint)
    result = ModelTensors(model.label, checkpoint.config, tensors, tied, untied, summaries, notes)
    if model.adapters:
        _fold_own_adapters(result, tensors, summaries, model.adapters)
    tie_head_to_embedding(tensors, tied, checkpoint)
    if not later:
        check_vocabulary(tensors, checkpoint)
    return result


def fold_adapters(
    name: str, base: LazyTensor, deltas: Sequence[tuple[WeightDelta, ...]], weights: Sequence[float]
) -> tuple[LazyTensor, str]:
    """base + sum(weight * delta), and that in words ("" where nothing changes). `deltas`: of each adapter.

    Raises SourceError for a replacement with another number of rows: it has no delta.
    """
    terms = [(weight, delta) for weight, group in zip(weights, deltas, strict=True) for delta in group if weight]
    if not terms:
        return base, ""
    if len(terms) == 1 and terms[0][0] == 1 and isinstance(terms[0][1], ReplaceTensor):
        return renamed_tensor(terms[0][1].value, name), "replaced by the adapter's"
    check_rows(name, base, deltas)
    _check_replacements(name, terms)
    labels = dict.fromkeys(delta.label for _, delta in terms)
    summary = f"base + {len(terms)} x {'/'.join(labels)}" if len(terms) > 1 else f"base + {terms[0][1].label}"
    return AdaptedTensor(base, tuple(terms)), summary


def _check_replacements(name: str, terms: Sequence[tuple[float, WeightDelta]]) -> None:
    """Several replacements of one tensor can be averaged, but their sum is meaningless."""
    weights = [weight for weight, delta in terms if isinstance(delta, ReplaceTensor)]
    if len(weights) > 1 and abs(sum(weights) - 1) > 1e-6:
        text = f"{len(weights)} adapters each replace {name}, and their weights sum to {sum(weights):g}"
        raise SourceError(text, hint="give them weights that sum to 1, or merge one after the other")


def check_rows(name: str, base: LazyTensor, deltas: Sequence[tuple[WeightDelta, ...]]) -> None:
    """Raise SourceError for a replacement with another number of rows: it cannot be weighted or combined."""
    for delta in (delta for group in deltas for delta in group):
        if isinstance(delta, ReplaceTensor) and delta.value.info.shape != base.info.shape:
            shapes = f"{list(delta.value.info.shape)}, the base has {list(base.info.shape)}"
            hint = "fold that adapter alone, with weight 1, and merge the others into the result"
            raise SourceError(f"{delta.value.file.path} replaces {name} with shape {shapes}", hint=hint)


def renamed_tensor(tensor: LazyTensor, name: str) -> LazyTensor:
    """The tensor under another name."""
    if tensor.info.name == name:
        return tensor
    if isinstance(tensor, StoredTensor):
        return replace(tensor, info=tensor.info.renamed(name))
    return AliasTensor(tensor, tensor.info.renamed(name))


def tie_head_to_embedding(
    tensors: dict[str, LazyTensor], tied: tuple[str, str] | None, checkpoint: ModelSource
) -> None:
    """A tied head that is stored all the same becomes what the embedding becomes."""
    if tied and tied[0] in tensors and tensors[tied[1]] is not checkpoint.tensors[tied[1]]:
        tensors[tied[0]] = renamed_tensor(tensors[tied[1]], tied[0])


def check_vocabulary(tensors: Mapping[str, LazyTensor], checkpoint: ModelSource) -> None:
    """Raise SourceError when adapters leave head and embedding with different numbers of rows."""
    heads = [name for name in tensors if is_head(name)]
    embeddings = [name for name in tensors if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS]
    if len(heads) != 1 or len(embeddings) != 1:
        return
    head, embedding = tensors[heads[0]].info, tensors[embeddings[0]].info
    before = [checkpoint.tensors[info.name].info.rows for info in (head, embedding) if info.name in checkpoint.tensors]
    if head.rows != embedding.rows and not {head.rows, embedding.rows} <= set(before):
        text = f"{embedding.name} would have {embedding.rows} rows and {head.name} {head.rows}"
        hint = "the adapter's file holds only one of the two resized tensors (PEFT saves only a targeted one)"
        raise SourceError(f"{text}: an adapter resized only one of them", hint=hint)


def _fold_own_adapters(
    model: ModelTensors, tensors: dict[str, LazyTensor], summaries: dict[str, str], adapters: Sequence[OpenAdapter]
) -> None:
    positions = layer_positions(tensors)
    for name, tensor in list(tensors.items()):
        deltas = [model.deltas(opened, name) for opened in adapters]
        if any(deltas):
            weights = [_weight(opened, name, positions[name]) for opened in adapters]
            tensors[name], summary = fold_adapters(name, tensor, deltas, weights)
            if summary:
                summaries[name] = summary


def _apply_saved_modules(tensors: dict[str, LazyTensor], opened: Sequence[OpenAdapter]) -> dict[str, str]:
    """Put in the tensors that adapters save whole: resized embeddings, and heads that the base lacks."""
    saved_by: dict[str, tuple[str, LazyTensor]] = {}
    for adapter in (one.adapter for one in opened):
        for name, saved in {**adapter.resized, **adapter.added}.items():
            label, earlier = saved_by.setdefault(name, (adapter.label, saved))
            if earlier is not saved and not same_rows(earlier, saved):
                hint = "fold them one after the other"
                raise SourceError(f"{label} and {adapter.label} both replace {name}, each differently", hint=hint)
            tensors[name] = renamed_tensor(saved, name)
    return dict.fromkeys(saved_by, "the adapter's")


def _resolve_tying(
    tensors: dict[str, LazyTensor], checkpoint: ModelSource, opened: Sequence[OpenAdapter]
) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """(head, embedding) that stay one tensor, or None where an adapter changes only one of them; and notes."""
    tied = tied_head(checkpoint)
    if tied is None:
        return None, ()
    head, embedding = tied
    for adapter in (one.adapter for one in opened):
        changed = {*adapter.deltas, *adapter.resized} & {head, embedding}
        if changed and not adapter.keeps_tied:
            if head not in adapter.resized:
                tensors[head] = renamed_tensor(tensors[embedding], head)
            names = format_list(sorted(changed))
            text = f"{adapter.label} changes {names}, but {checkpoint.label} ties head and embedding"
            return None, (f"{text}: both are written, and tie_word_embeddings becomes false",)
    return tied, ()


def _fake_quantize_adapted(
    tensors: dict[str, LazyTensor], checkpoint: ModelSource, opened: Sequence[OpenAdapter], *, double_quant: bool
) -> tuple[str, ...]:
    """Replace the weights that adapters change by their NF4 values; returns a note.

    bitsandbytes quantizes linear layers only: no embeddings, heads, norms, biases or stacked experts.
    Raises SourceError for GPT-2's Conv1D, whose quantization blocks run along the other dimension.
    """
    if opened and checkpoint.config.get("model_type") in CONV1D_MODELS:
        text = f"{checkpoint.label} stores its weights transposed, so their NF4 values cannot be computed"
        raise SourceError(text, hint="use base_numerics: original")
    adapters = [one.adapter for one in opened]
    names = {name for adapter in adapters for name, deltas in adapter.deltas.items() if any(map(_is_additive, deltas))}
    names -= {name for adapter in adapters for name in adapter.parameters}
    quantized = [name for name in sorted(names) if name in tensors and _is_linear(name, tensors[name])]
    for name in quantized:
        tensors[name] = FakeQuantizedTensor(tensors[name], double_quant)
    scheme = f"NF4 {'with' if double_quant else 'without'} double quantization"
    text = f"base_numerics: {len(quantized)} tensors of {checkpoint.label} are taken as {scheme} holds them"
    return (text,) if quantized else ()


def _is_additive(delta: WeightDelta) -> bool:
    return not isinstance(delta, ReplaceTensor | ReplaceRows)


def _is_linear(name: str, tensor: LazyTensor) -> bool:
    if isinstance(tensor, QuantizedTensor):
        return False  # it is already what was trained on
    module = name.split(".")[-2:-1]
    return len(tensor.info.shape) == 2 and tensor.info.is_float and not set(module) & {*HEADS, *EMBEDDINGS}


def _weight(opened: OpenAdapter, name: str, position: float) -> float:
    value = value_at(opened.entry.weight, name, position)
    return 0.0 if value is None else float(value)
