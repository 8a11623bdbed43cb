"""Recipe and inputs -> the way in which every output tensor comes about.

With adapters alone, each adapter is a task vector on the base and any method applies to these.
With models, an adapter is one more model: the base plus its delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeforge.adapters.adapted_tensor import AdapterDelta
from mergeforge.adapters.deltas import WeightDelta
from mergeforge.errors import RecipeError, SourceError, listing
from mergeforge.methods import METHODS, Method
from mergeforge.planner.inputs import Inputs, OpenAdapter
from mergeforge.planner.layer_slices import LayerStack, MergeGroup, OutputTensor, SourceModel, whole_model_tensors
from mergeforge.planner.model_tensors import (
    ModelTensors,
    check_rows,
    check_vocabulary,
    fold_adapters,
    renamed_tensor,
    tie_head_to_embedding,
)
from mergeforge.planner.output_tensors import merge_group, output_tensors
from mergeforge.planner.parameters import Input, parameters_for
from mergeforge.recipe import WITHOUT_EFFECT, ModelEntry, Recipe, Rule
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.stored import StoredTensor, same_content

FOLDS = ("fold", "task_arithmetic", "linear")  # over adapters: base + sum(weight * delta)
_AS_IT_IS = Rule()


@dataclass(frozen=True)
class MergeGraph:
    """Every output tensor's way by name, what happens to it in words, and whether it ends up tied.

    `stacks`: the layers of the output, where slices say them.
    """

    tensors: Mapping[str, LazyTensor]
    summaries: Mapping[str, str]
    tied: bool
    notes: tuple[str, ...]
    layer_stacks: tuple[LayerStack, ...] = ()


@dataclass(frozen=True)
class _MergeStep:
    """What the tensors of one section that follow one rule have in common: the method and its inputs, in its order.

    `base`: what task vectors start from. `adapters`: the top-level ones, as further inputs.
    """

    method: Method
    sources: tuple[SourceModel, ...]
    base: SourceModel | None
    scopes: tuple[Mapping[str, Any], ...]
    adapters: tuple[OpenAdapter, ...]


def compose(recipe: Recipe, inputs: Inputs, tables: Mapping[str, ModelTensors]) -> MergeGraph:
    """The whole merge as ways; `tables`: every model's by its label, the base's with the shapes that adapters give it.

    Raises RecipeError or SourceError when inputs, shapes or parameters do not fit together.
    """
    return _Composer(recipe, inputs, tables).composition()


@dataclass
class _Composer:
    recipe: Recipe
    inputs: Inputs
    tables: Mapping[str, ModelTensors]
    notes: list[str] = field(default_factory=list)
    actions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, dict[str, None]] = field(default_factory=dict)
    stacks: tuple[LayerStack, ...] = ()

    def __post_init__(self) -> None:
        self._groups: dict[tuple[int, int], _MergeStep] = {}
        for table in self.tables.values():
            self.actions.update(table.summaries)
            self.notes += table.notes

    def composition(self) -> MergeGraph:
        ways, tied = self._compose_models() if self.recipe.lists else self._compose_adapters()
        self._note_what_has_no_effect()
        return MergeGraph(ways, self.actions, tied, tuple(self.notes), self.stacks)

    def _note_what_has_no_effect(self) -> None:
        recipe = self.recipe
        scopes = [recipe.parameters, *(one.parameters for one in recipe.slices)]
        scopes += [*(one.parameters for one in recipe.modules), *(one.parameters for one in recipe.rules)]
        for name in WITHOUT_EFFECT:
            if any(name in scope for scope in scopes):
                self.notes.append(f"{name} has no effect: no mask is ever stored (mergekit's has none either)")

    def _base(self) -> ModelTensors:
        assert self.recipe.base_model is not None
        return self.tables[str(self.recipe.base_model)]

    def _rule(self, name: str) -> Rule:
        """The first rule that matches."""
        return next((rule for rule in self.recipe.rules if rule.matches(name)), _AS_IT_IS)

    def _method(self, rule: Rule, name: str, has_base: bool) -> Method:
        asked = rule.merge_method or self.recipe.merge_method
        if not asked:
            hint = "give the recipe a merge_method, or end the rules with one that has no match"
            raise RecipeError(f"no rule says how {name} is merged", hint=hint)
        method = METHODS[asked]
        if method.needs_base and not has_base:
            raise RecipeError(
                f"{name}: {asked} needs a base_model", hint="name the model that the others were tuned from"
            )
        return method.for_base(has_base)

    # adapters alone

    def _compose_adapters(self) -> tuple[dict[str, LazyTensor], bool]:
        base, table = self.inputs.base, self._base()
        assert base is not None
        section = merge_group((), self.recipe.base_model, (self.recipe.parameters,), self.tables)
        ways: dict[str, LazyTensor] = {}
        for spot in whole_model_tensors(section, table.tensors):
            rule, way = self._rule(spot.name), table.tensors[spot.name]
            edits = [table.deltas(opened, spot.name) for opened in self.inputs.adapters]
            if rule.use:
                ways[spot.name] = self._taken_from(spot, rule.use) or way
            elif not rule.drop:
                ways[spot.name] = self._adapted(spot.name, way, edits, spot.position, rule) if any(edits) else way
        if self.missing:
            self._refuse_missing()
        tie_head_to_embedding(ways, table.tied, base.checkpoint)
        check_vocabulary(ways, base.checkpoint)
        return ways, table.tied is not None

    def _adapted(
        self, name: str, base: LazyTensor, edits: Sequence[tuple[WeightDelta, ...]], position: float, rule: Rule
    ) -> LazyTensor:
        method = self._method(rule, name, has_base=True)
        _check_count(method, len(edits))
        inputs = [_adapter_input(opened, name) for opened in self.inputs.adapters]
        scopes = (rule.parameters, self.recipe.parameters)
        parameters = parameters_for(method, name, position, inputs, scopes, own_first=not rule.parameters)
        if method.name in FOLDS:
            return self._fold(name, base, edits, _fold_weights(parameters))
        check_rows(name, base, edits)
        self.actions[name] = f"{method.name} of {len(edits)} adapters' deltas"
        deltas = tuple(AdapterDelta(base, one) for one in edits)
        return MergedTensor(
            base.info, method, deltas, (False,) * len(deltas), base, parameters, self.recipe.random_seed
        )

    def _fold(self, name: str, base: LazyTensor, edits: Sequence[tuple[WeightDelta, ...]], weights: Sequence[float]) -> LazyTensor:
        way, action = fold_adapters(name, base, edits, weights)
        if action:
            self.actions[name] = action
        return way

    # models, with or without adapters

    def _compose_models(self) -> tuple[dict[str, LazyTensor], bool]:
        spots, self.stacks = output_tensors(self.recipe, self.tables, lambda name: self._rule(name) is not _AS_IT_IS)
        ways = {spot.name: way for spot in spots if (way := self._tensor(spot)) is not None}
        if self.missing:
            self._refuse_missing()
        used = {id(source.model): source.model for spot in spots for source in spot.group.sources}
        if self.recipe.base_model:
            used.setdefault(id(self._base()), self._base())
        tied = all(table.tied and table.tied[0] not in ways for table in used.values())
        if tied and self.stacks:
            self._note_ties_across(spots)
        return ways, tied

    def _note_ties_across(self, spots: Sequence[OutputTensor]) -> None:
        """A tied head follows the first slice's embedding, though the last slice's layers stand before it."""
        first, last = spots[0].group.sources[0], spots[-1].group.sources[0]
        if first.model is not last.model:
            text = f"the head is tied to the embedding of {first.label}, behind layers of {last.label}"
            self.notes.append(f"{text} (as in mergekit)")

    def _tensor(self, spot: OutputTensor) -> LazyTensor | None:
        """How one output tensor comes about; None where it is dropped, or some input lacks it."""
        rule = self._rule(spot.name)
        if rule.drop:
            return None
        if rule.use:
            return self._taken_from(spot, rule.use)
        group = self._merge_step(spot, rule)
        found = [self._source_tensor(source, spot) for source in group.sources]
        origin = self._source_tensor(group.base, spot) if group.base else None
        if None in found or (group.base and origin is None):
            return None
        return self._merged(spot, group, [way for way in found if way], origin, rule)

    def _source_tensor(self, source: SourceModel, spot: OutputTensor) -> LazyTensor | None:
        """The spot's tensor in a source, under its output name; a lack is noted."""
        name = spot.name_in(source)
        way = source.model.tensor(name)
        if way is None:
            self.missing.setdefault(source.label, {})[name] = None
            return None
        return renamed_tensor(way, spot.name)

    def _taken_from(self, spot: OutputTensor, entry: ModelEntry) -> LazyTensor | None:
        """The tensor of one model, as it is."""
        label = str(self.recipe.base_model) if str(entry) == "base" else str(entry)
        if label not in self.tables:
            raise RecipeError(f"'use: {entry}' needs a base_model", hint="name one, or use one of the models")
        source = next((one for one in spot.group.every if one.label == label), None)
        if source is None and spot.layer >= 0:
            text = f"'use: {entry}' at {spot.name}: the slice of that layer does not say which layer of it that is"
            raise RecipeError(text, hint="list it among the slice's sources")
        way = self._source_tensor(source or SourceModel(label, self.tables[label], {}), spot)
        if way is not None:
            self.actions[spot.name] = f"taken from {label}"
        return way

    def _merge_step(self, spot: OutputTensor, rule: Rule) -> _MergeStep:
        key = (id(spot.group), id(rule))
        if key not in self._groups:
            self._groups[key] = self._make_group(spot, rule)
        return self._groups[key]

    def _make_group(self, spot: OutputTensor, rule: Rule) -> _MergeStep:
        section = spot.group
        if rule.models:
            base = section.base.label if section.base else None
            told = self.recipe.base_model
            section = merge_group(rule.models, told if base == str(told) else None, section.scopes, self.tables)
        method = self._method(rule, spot.name, section.base is not None)
        sources, base_source = self._method_inputs(method, section)
        adapters = self.inputs.adapters
        _check_count(method, len(sources) + len(adapters))
        return _MergeStep(method, tuple(sources), base_source, (rule.parameters, *section.scopes), adapters)

    def _method_inputs(self, method: Method, section: MergeGroup) -> tuple[list[SourceModel], SourceModel | None]:
        """The models that are the method's inputs, in its order, and the base of task vectors."""
        sources, base = list(section.sources), section.base
        if base is None:
            return sources, None
        listed = base in sources
        if listed and (method.on_deltas or method.base_is_input):
            sources.remove(base)
        if method.on_deltas:
            return sources, base
        adapters = len(self.inputs.adapters)
        if method.base_is_input and (not adapters or len(sources) + adapters < method.inputs[1]):
            return [base, *sources], None
        if not listed and not section.layer_count and self._counts_base(method, len(sources)):
            return [*sources, base], None
        if not listed and not section.layer_count:
            self.notes.append("base_model gives names, config and tokenizer; its weights take no part")
        return sources, None

    def _counts_base(self, method: Method, others: int) -> bool:
        """Whether an unlisted base is one input more, as in mergekit: if the recipe gives it parameters."""
        required = (one.name for one in method.parameters.values() if one.per_input and one.required)
        return others < method.inputs[1] and all(name in self.recipe.parameters for name in required)

    def _refuse_missing(self) -> None:
        """Say what which model lacks. Raises SourceError."""
        label, names = next(iter(self.missing.items()))
        holders = [table.label for table in self.tables.values() if any(name in table.tensors for name in names)]
        text = f"{label} lacks {listing(names)}, which {listing(sorted(holders), 3)} has"
        hint = "models of one architecture only; or say what to do: rules: [{match: ..., use: MODEL}] or drop: true"
        raise SourceError(text, hint=hint)

    def _merged(
        self, spot: OutputTensor, group: _MergeStep, models: Sequence[LazyTensor], origin: LazyTensor | None, rule: Rule
    ) -> LazyTensor:
        name, method = spot.name, group.method
        donor = origin or models[0]
        labels = [source.label for source in group.sources]
        for way, label in zip(models, labels, strict=True):
            self._check_shape(name, way, label, donor)
        if not donor.info.is_float:
            return self._not_float(name, donor, models, labels)
        base = self._base() if group.adapters else None
        edits = [base.deltas(opened, name) for opened in group.adapters] if base else []
        inputs = [Input(source.label, source.parameters, spot.name_in(source)) for source in group.sources]
        inputs += [_adapter_input(opened, name) for opened in group.adapters]
        own_first = bool(rule.models) or not rule.parameters
        parameters = parameters_for(method, name, spot.position, inputs, group.scopes, own_first=own_first)
        if method.on_deltas:
            assert origin is not None
            check_rows(name, origin, edits)
            ways = (*models, *(AdapterDelta(origin, some) for some in edits))
            subtract = (True,) * len(models) + (False,) * len(edits)
            if not ways:
                return origin
        else:
            adapted = self._fold_each_adapter(name, edits)
            ways, subtract = (*models, *adapted), (False,) * (len(models) + len(adapted))
        if method.name == "passthrough" and parameters["scale"][0] in (None, 1.0):
            self.actions.pop(name, None)
            return ways[0]
        self.actions[name] = f"{method.name} of {len(ways)}"
        start = origin if method.on_deltas else None
        return MergedTensor(donor.info, method, ways, subtract, start, parameters, self.recipe.random_seed)

    def _fold_each_adapter(self, name: str, edits: Sequence[tuple[WeightDelta, ...]]) -> list[LazyTensor]:
        """The base with each adapter alone."""
        way = self._base().tensor(name) if edits else None
        return [self._fold(name, way, [some], [1.0]) for some in edits] if way else []

    def _check_shape(self, name: str, way: LazyTensor, label: str, donor: LazyTensor) -> None:
        if way.info.shape == donor.info.shape:
            return
        shapes = f"{list(way.info.shape)}, not {list(donor.info.shape)} as in {self.inputs.reference_model.label}"
        hint = "models of one shape only"
        if way.info.shape[1:] == donor.info.shape[1:] and name.rpartition(".")[0].endswith(_VOCABULARY):
            hint = "the vocabularies differ: 'tokenizer_source: union' (or base) maps their rows to one another"
        raise SourceError(f"{label}: {name} is {shapes}", hint=hint)

    def _not_float(self, name: str, donor: LazyTensor, models: Sequence[LazyTensor], labels: Sequence[str]) -> LazyTensor:
        """Integers and flags (position ids, counters, masks) are copied where all models agree on them."""
        first = _stored(donor)
        for way, label in zip(models, labels, strict=True):
            other = _stored(way)
            if first is None or other is None or first is other or same_content(first, other):
                continue
            hint = "take one model's: rules: [{match: ..., use: MODEL}]"
            if donor.info.bits == 8 and donor.info.dtype not in ("BOOL",):
                hint = "a quantised checkpoint cannot be merged: give its 16-bit version"
            text = f"{name} is {donor.info.dtype}, not a float, and differs in {label}: it cannot be averaged"
            raise SourceError(text, hint=hint)
        self.actions[name] = "copied (not a float)"
        return donor


_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")


def _stored(way: LazyTensor) -> StoredTensor | None:
    while not isinstance(way, StoredTensor) and len(way.inputs) == 1:
        way = way.inputs[0]
    return way if isinstance(way, StoredTensor) else None


def _adapter_input(opened: OpenAdapter, name: str) -> Input:
    return Input(opened.adapter.label, {"weight": opened.entry.weight, **opened.entry.parameters}, name)


def _check_count(method: Method, count: int) -> None:
    low, high = method.inputs
    if not low <= count <= high:
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        raise RecipeError(f"{method.name} takes {wanted} inputs; the recipe gives {count}")


def _fold_weights(parameters: Mapping[str, Any]) -> list[float]:
    weights = parameters["weight"]
    divisor = sum(weights) if parameters["normalize"] and abs(sum(weights)) >= 1e-8 else 1.0
    return [weight * parameters.get("lambda", 1.0) / divisor for weight in weights]
