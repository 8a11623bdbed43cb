"""The tensors of one model as LazyTensors: its own adapters folded in, tied head and embedding resolved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import ReplaceRows, ReplaceTensor, WeightDelta
from mergeforge.adapters.resized_embedding import same_rows
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS, class_names, is_head
from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.checkpoints.ties import ModelTies, Tie, model_ties
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.planner.inputs import OpenAdapter, OpenModel
from mergeforge.recipe.parameter_values import layer_positions, value_at
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.padded import PaddedTensor
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class ModelTensors:
    """One model's tensors by name.

    ties: the names that are one tensor. untied: whether an adapter has made several tensors of such a one, all of which
    are then in `tensors`. summaries, notes: what the model's own adapters did, in words.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    ties: tuple[Tie, ...] = ()
    untied: bool = False
    summaries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> LazyTensor | None:
        """The tensor of that name; a tied head is its embedding under another name."""
        if name in self.tensors:
            return self.tensors[name]
        tie = next((tie for tie in self.ties if name in tie.names), None)
        return renamed_tensor(self.tensors[tie.origin], name) if tie else None

    def with_all_names(self) -> ModelTensors:
        """The model with every tied tensor under each of its names."""
        names = [name for tie in self.ties for name in tie.names if name not in self.tensors]
        added = {name: tensor for name in names if (tensor := self.tensor(name)) is not None}
        return replace(self, tensors={**self.tensors, **added})


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
    ties = model_ties(checkpoint)
    notes = _resolve_ties(tensors, ties, checkpoint, opened)
    untied = bool(notes)
    _pad_biases(tensors, ties, checkpoint)
    if numerics != "original":
        notes += _fake_quantize_adapted(tensors, checkpoint, opened, double_quant=numerics == "dequant_nf4")
    remaining = () if untied else ties.ties
    result = ModelTensors(model.label, checkpoint.config, tensors, remaining, untied, summaries, notes)
    if model.adapters:
        _fold_own_adapters(tensors, summaries, model.adapters)
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


def check_vocabulary(tensors: Mapping[str, LazyTensor], checkpoint: ModelSource) -> None:
    """Raise SourceError when adapters leave embedding and head, or a head's bias, with different numbers of tokens."""
    ties = model_ties(checkpoint)
    names = [name for name in tensors if ties.has_token_rows(name)]
    if len([name for name in names if is_head(name)]) > 1 and not ties.token_rows:
        return  # several towers
    before = {_tokens(checkpoint.tensors[name].info) for name in names if name in checkpoint.tensors}
    after = {_tokens(tensors[name].info): name for name in names}
    if len(after) > 1 and not after.keys() <= before:
        (count, name), (other_count, other) = sorted(after.items(), reverse=True)[:2]
        hint = "the adapter's file holds only one of the two resized tensors (PEFT saves only a targeted one)"
        text = f"{name} would have {count} rows and {other} {other_count}"
        raise SourceError(f"{text}: an adapter resized only one of them", hint=hint)


def _tokens(info: TensorInfo) -> int:
    """The number of tokens that a tensor has entries for; BART's final_logits_bias is (1, tokens)."""
    return info.columns if info.rows == 1 else info.rows


def _pad_biases(tensors: dict[str, LazyTensor], ties: ModelTies, checkpoint: ModelSource) -> None:
    """Give biases that no adapter saves, as BART's final_logits_bias, zeros for new tokens, as transformers does."""
    embeddings = [name for name in (ties.embedding, ties.head, *ties.token_rows) if name in checkpoint.tensors]
    if not embeddings or not embeddings[0].endswith(".weight"):
        return
    old, new = (source[embeddings[0]].info.rows for source in (checkpoint.tensors, tensors))
    for name in ties.token_rows:
        stored = checkpoint.tensors.get(name)
        if new > old and stored is not None and tensors.get(name) is stored and stored.info.shape == (1, old):
            tensors[name] = PaddedTensor(stored, replace(stored.info, shape=(1, new)))


def _fold_own_adapters(
    tensors: dict[str, LazyTensor], summaries: dict[str, str], adapters: Sequence[OpenAdapter]
) -> None:
    positions = layer_positions(tensors)
    for name, tensor in list(tensors.items()):
        deltas = [opened.adapter.deltas.get(name, ()) for opened in adapters]
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


def _resolve_ties(
    tensors: dict[str, LazyTensor], ties: ModelTies, checkpoint: ModelSource, opened: Sequence[OpenAdapter]
) -> tuple[str, ...]:
    """Put in tied tensors under all their names where an adapter changes only some of them; a note, or none.

    Raises SourceError for a class whose ties are not known.
    """
    adapters = [one.adapter for one in opened]
    breaking = next((adapter for adapter in adapters if adapter.breaks_ties), None)
    if pattern := next((text for text in ties.patterns for one in adapters if _matches(text, one.deltas)), ""):
        text = f"{checkpoint.label} ties tensors by the pattern {pattern!r}, and an adapter changes some of these"
        raise SourceError(text, hint="merging an adapter into tied layers of this class is not supported")
    for tie in ties.ties:
        for name in tie.names:
            if breaking and name not in tensors:
                tensors[name] = renamed_tensor(tensors[tie.origin], name)
            elif not breaking and name not in tie.stored:
                tensors.pop(name, None)
    if breaking is None:
        return ()
    tied = {name for tie in ties.ties for name in tie.names}
    names = format_list(sorted({*breaking.deltas, *breaking.resized} & tied))
    others = format_list(sorted(tied - {*breaking.deltas, *breaking.resized}))
    text = f"{breaking.label} changes {names}, which {checkpoint.label} ties to {others or 'each other'}"
    if not ties.known:
        classes = format_list(class_names(checkpoint.config) or ["(none)"])
        hint = "save the base with its head as a tensor of its own and tie_word_embeddings: false, and merge into that"
        raise SourceError(f"{text}; how the class {classes} loads the result is not known", hint=hint)
    if ties.keeps_flag:
        return (f"{text}: all are written; transformers before version 5 ties them again",)
    return (f"{text}: all are written, and tie_word_embeddings becomes false",)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(rf"(^|\.){pattern}", name) for name in names)


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
