"""Tables: every tensor of one model as a way, its own adapters folded in, head and embedding settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import ReplaceRows, ReplaceTensor, WeightDelta
from mergeforge.adapters.resized_embedding import same_rows
from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS, is_head, tied_head
from mergeforge.checkpoints.quantized.fake_nf4 import FakeQuantizedTensor
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.errors import SourceError, listing
from mergeforge.planner.inputs import OpenAdapter, OpenModel
from mergeforge.recipe.parameter_values import layer_positions, value_at
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class ModelTensors:
    """The ways of one model's tensors, and (head, embedding) while these are one tensor.

    `parted`: the same names, once an adapter has made them two tensors. `actions` and `notes`: what
    its own adapters did, in words.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    tied: tuple[str, str] | None
    untied: tuple[str, str] | None = None
    summaries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> LazyTensor | None:
        """A tensor's way; a tied head is its embedding under another name."""
        if name in self.tensors:
            return self.tensors[name]
        if self.tied and name == self.tied[0]:
            return renamed_tensor(self.tensors[self.tied[1]], name)
        return None

    def deltas(self, opened: OpenAdapter, name: str) -> tuple[WeightDelta, ...]:
        """An adapter's edits of a tensor; what it does to an embedding for its tied head, too."""
        if self.untied and name == self.untied[0] and opened.adapter.keeps_tied:
            name = self.untied[1]
        return opened.adapter.edits.get(name, ())


def model_tensors(model: OpenModel, later: Sequence[OpenAdapter] = (), numerics: str = "original") -> ModelTensors:
    """A model's table with its own adapters folded in; `later` adapters only settle shapes and ties.

    `numerics` "dequant_nf4": what adapters change is taken as NF4 would hold it, on which QLoRA trained them.

    Raises SourceError when its adapters cannot be folded together.
    """
    opened = (*model.adapters, *later)
    checkpoint = model.checkpoint
    ways: dict[str, LazyTensor] = dict(checkpoint.tensors)
    actions = _apply_saved_modules(ways, opened)
    tied, notes = _resolve_tying(ways, checkpoint, opened)
    if numerics != "original":
        notes += _fake_quantize_adapted(ways, checkpoint, opened, double_quant=numerics == "dequant_nf4")
    table = ModelTensors(
        model.label, checkpoint.config, ways, tied, None if tied else tied_head(checkpoint), actions, notes
    )
    if model.adapters:
        _fold_own_adapters(table, ways, actions, model.adapters)
    tie_head_to_embedding(ways, tied, checkpoint)
    if not later:
        check_vocabulary(ways, checkpoint)
    return table


def fold_adapters(
    name: str, base: LazyTensor, edits: Sequence[tuple[WeightDelta, ...]], weights: Sequence[float]
) -> tuple[LazyTensor, str]:
    """base + sum(weight * edit), and what that is in words ("" where nothing changes).

    Raises SourceError for a replacement with another number of rows: it has no delta.
    """
    terms = [(weight, edit) for weight, some in zip(weights, edits, strict=True) for edit in some if weight]
    if not terms:
        return base, ""
    if len(terms) == 1 and terms[0][0] == 1 and isinstance(terms[0][1], ReplaceTensor):
        return renamed_tensor(terms[0][1].value, name), "replaced by the adapter's"
    check_rows(name, base, edits)
    _check_replacements(name, terms)
    kinds = dict.fromkeys(edit.label for _, edit in terms)
    action = f"base + {len(terms)} x {'/'.join(kinds)}" if len(terms) > 1 else f"base + {terms[0][1].label}"
    return AdaptedTensor(base, tuple(terms)), action


def _check_replacements(name: str, terms: Sequence[tuple[float, WeightDelta]]) -> None:
    """Several replacements of one tensor can be averaged; added up they are nobody's."""
    weights = [weight for weight, edit in terms if isinstance(edit, ReplaceTensor)]
    if len(weights) > 1 and abs(sum(weights) - 1) > 1e-6:
        text = f"{len(weights)} adapters each bring their own {name}, and their weights sum to {sum(weights):g}"
        raise SourceError(text, hint="give them weights that sum to 1, or merge one after the other")


def check_rows(name: str, base: LazyTensor, edits: Sequence[tuple[WeightDelta, ...]]) -> None:
    """A replacement with another number of rows has no delta: it cannot be weighted or combined."""
    for edit in (edit for some in edits for edit in some):
        if isinstance(edit, ReplaceTensor) and edit.value.info.shape != base.info.shape:
            shapes = f"{list(edit.value.info.shape)}, the base has {list(base.info.shape)}"
            hint = "fold that adapter alone, with weight 1, and merge the others into the result"
            raise SourceError(f"{edit.value.file.path} replaces {name} with shape {shapes}", hint=hint)


def renamed_tensor(way: LazyTensor, name: str) -> LazyTensor:
    """The way's tensor under another name."""
    if way.info.name == name:
        return way
    if isinstance(way, StoredTensor):
        return replace(way, info=way.info.renamed(name))
    return AliasTensor(way, way.info.renamed(name))


def tie_head_to_embedding(ways: dict[str, LazyTensor], tied: tuple[str, str] | None, checkpoint: ModelSource) -> None:
    """A tied head that is stored all the same is written as what the embedding becomes."""
    if tied and tied[0] in ways and ways[tied[1]] is not checkpoint.tensors[tied[1]]:
        ways[tied[0]] = renamed_tensor(ways[tied[1]], tied[0])


def check_vocabulary(ways: Mapping[str, LazyTensor], checkpoint: ModelSource) -> None:
    """Raises SourceError when adapters leave a head and an embedding with different numbers of rows."""
    heads = [name for name in ways if is_head(name)]
    embeddings = [name for name in ways if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS]
    if len(heads) != 1 or len(embeddings) != 1:
        return
    head, embedding = ways[heads[0]].info, ways[embeddings[0]].info
    before = [checkpoint.tensors[info.name].info.rows for info in (head, embedding) if info.name in checkpoint.tensors]
    if head.rows != embedding.rows and not {head.rows, embedding.rows} <= set(before):
        text = f"{embedding.name} would have {embedding.rows} rows and {head.name} {head.rows}"
        hint = "the adapter's file holds only one of the two that were resized (PEFT saves only a targeted one)"
        raise SourceError(f"{text}: an adapter resized one of them alone", hint=hint)


def _fold_own_adapters(
    table: ModelTensors, ways: dict[str, LazyTensor], actions: dict[str, str], adapters: Sequence[OpenAdapter]
) -> None:
    positions = layer_positions(ways)
    for name, way in list(ways.items()):
        edits = [table.deltas(one, name) for one in adapters]
        if any(edits):
            ways[name], action = fold_adapters(
                name, way, edits, [_weight(one, name, positions[name]) for one in adapters]
            )
            if action:
                actions[name] = action


def _apply_saved_modules(ways: dict[str, LazyTensor], opened: Sequence[OpenAdapter]) -> dict[str, str]:
    """Tensors that adapters bring whole: grown embeddings, heads that the base lacks."""
    placed: dict[str, tuple[str, LazyTensor]] = {}
    for one in opened:
        for name, brought in {**one.adapter.resized, **one.adapter.added}.items():
            label, other = placed.setdefault(name, (one.adapter.label, brought))
            if other is not brought and not same_rows(other, brought):
                hint = "fold them one after the other"
                raise SourceError(f"{label} and {one.adapter.label} both bring their own {name}", hint=hint)
            ways[name] = renamed_tensor(brought, name)
    return dict.fromkeys(placed, "the adapter's")


def _resolve_tying(
    ways: dict[str, LazyTensor], checkpoint: ModelSource, opened: Sequence[OpenAdapter]
) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """(head, embedding) that stay one tensor, or None where an adapter changes one and not the other."""
    tied = tied_head(checkpoint)
    if tied is None:
        return None, ()
    head, embedding = tied
    for one in opened:
        touched = {*one.adapter.edits, *one.adapter.resized} & {head, embedding}
        if touched and not one.adapter.keeps_tied:
            if head not in one.adapter.resized:
                ways[head] = renamed_tensor(ways[embedding], head)
            note = f"{one.adapter.label} changes {listing(sorted(touched))}, which {checkpoint.label} ties: "
            return None, (note + "both are written, tie_word_embeddings becomes false",)
    return tied, ()


def _fake_quantize_adapted(
    ways: dict[str, LazyTensor], checkpoint: ModelSource, adapters: Sequence[OpenAdapter], *, double_quant: bool
) -> tuple[str, ...]:
    """Put what NF4 makes of them in the place of the weights that adapters change.

    bitsandbytes quantises linear layers alone: no embeddings, heads, norms, biases or stacks of experts.
    Raises SourceError for GPT-2's Conv1D, whose blocks run along the other side of the weight.
    """
    if adapters and checkpoint.config.get("model_type") in CONV1D_MODELS:
        hint = "base_numerics: original"
        raise SourceError(f"{checkpoint.label} stores its weights transposed: NF4 cannot be told from that", hint=hint)
    touched = {name for one in adapters for name, edits in one.adapter.edits.items() if any(map(_is_additive, edits))}
    touched -= {name for one in adapters for name in one.adapter.parameters}
    changed = [name for name in sorted(touched) if name in ways and _is_linear(name, ways[name])]
    for name in changed:
        ways[name] = FakeQuantizedTensor(ways[name], double_quant)
    how = f"NF4 {'with' if double_quant else 'without'} double quantisation"
    text = f"base_numerics: {len(changed)} tensors of {checkpoint.label} are taken as {how} holds them"
    return (text,) if changed else ()


def _is_additive(edit: WeightDelta) -> bool:
    return not isinstance(edit, ReplaceTensor | ReplaceRows)


def _is_linear(name: str, way: LazyTensor) -> bool:
    if isinstance(way, QuantizedTensor):
        return False  # it is already what was trained on
    last = name.split(".")[-2:-1]
    return len(way.info.shape) == 2 and way.info.is_float and not set(last) & {*HEADS, *EMBEDDINGS}


def _weight(opened: OpenAdapter, name: str, position: float) -> float:
    value = value_at(opened.entry.weight, name, position)
    return 0.0 if value is None else float(value)
