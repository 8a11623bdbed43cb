"""Recipe and inputs -> the LazyTensor of every output tensor.

With adapters alone, each adapter is a task vector on the base, and any method applies to these.
With models, an adapter is one more model: the base plus its delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeforge.adapters.adapted_tensor import AdapterDelta
from mergeforge.adapters.deltas import WeightDelta
from mergeforge.errors import RecipeError, SourceError, format_list
from mergeforge.methods import METHODS, Method
from mergeforge.planner.inputs import Inputs, OpenAdapter
from mergeforge.planner.layer_slices import LayerStack, MergeGroup, OutputTensor, SourceModel, whole_model_tensors
from mergeforge.planner.model_tensors import (
    ModelTensors,
    check_rows,
    check_vocabulary,
    fold_adapters,
    renamed_tensor,
)
from mergeforge.planner.output_tensors import is_buffer_of_some, merge_group, output_tensors
from mergeforge.planner.parameters import MethodInput, parameters_for
from mergeforge.planner.tied_names import splits_a_tie, with_same_names
from mergeforge.recipe import ModelEntry, Recipe, Rule
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.stored import StoredTensor, same_content

FOLDS = ("fold", "task_arithmetic", "linear")  # over adapters: base + sum(weight * delta)
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")
_NO_RULE = Rule()


@dataclass(frozen=True)
class MergeGraph:
    """Every output tensor by name, and what is done to it in words.

    untied: whether tensors that an input ties are written as several. layer_stacks: the layers of the output, where
    slices define them.
    """

    tensors: Mapping[str, LazyTensor]
    summaries: Mapping[str, str]
    untied: bool
    notes: tuple[str, ...]
    layer_stacks: tuple[LayerStack, ...] = ()


@dataclass(frozen=True)
class _MergeStep:
    """What the tensors of one merge group that follow one rule share: the method and its inputs, in its order.

    base: what task vectors are relative to. adapters: the recipe's top-level ones, as further inputs.
    """

    method: Method
    sources: tuple[SourceModel, ...]
    base: SourceModel | None
    scopes: tuple[Mapping[str, Any], ...]
    adapters: tuple[OpenAdapter, ...]


def compose(recipe: Recipe, inputs: Inputs, models: Mapping[str, ModelTensors]) -> MergeGraph:
    """Every output tensor. `models`: each model's tensors by its label, the base's with shapes as adapters change them.

    Raises RecipeError or SourceError when inputs, shapes or parameters do not fit together.
    """
    return _Composer(recipe, inputs, with_same_names(models)).graph()


@dataclass
class _Composer:
    recipe: Recipe
    inputs: Inputs
    models: Mapping[str, ModelTensors]
    notes: list[str] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)
    missing: dict[str, dict[str, None]] = field(default_factory=dict)
    layer_stacks: tuple[LayerStack, ...] = ()

    def __post_init__(self) -> None:
        self._steps: dict[tuple[int, int], _MergeStep] = {}
        for model in self.models.values():
            self.summaries.update(model.summaries)
            self.notes += model.notes

    def graph(self) -> MergeGraph:
        tensors, untied = self._compose_models() if self.recipe.model_lists else self._compose_adapters()
        return MergeGraph(tensors, self.summaries, untied, tuple(self.notes), self.layer_stacks)

    def _base(self) -> ModelTensors:
        assert self.recipe.base_model is not None
        return self.models[str(self.recipe.base_model)]

    def _rule(self, name: str) -> Rule:
        """The first rule that matches."""
        return next((rule for rule in self.recipe.rules if rule.matches(name)), _NO_RULE)

    def _method(self, rule: Rule, name: str, has_base: bool) -> Method:
        method_name = rule.merge_method or self.recipe.merge_method
        if not method_name:
            hint = "give the recipe a merge_method, or end the rules with one that has no match"
            raise RecipeError(f"no rule says how to merge {name}", hint=hint)
        method = METHODS[method_name]
        if method.needs_base and not has_base:
            hint = "name the model that the others were fine-tuned from"
            raise RecipeError(f"{name}: {method_name} needs a base_model", hint=hint)
        return method.for_base(has_base)

    # adapters alone

    def _compose_adapters(self) -> tuple[dict[str, LazyTensor], bool]:
        base, model = self.inputs.base, self._base()
        assert base is not None
        group = merge_group((), self.recipe.base_model, (self.recipe.parameters,), self.models)
        tensors: dict[str, LazyTensor] = {}
        for output in whole_model_tensors(group, model.tensors):
            rule, tensor = self._rule(output.name), model.tensors[output.name]
            deltas = [opened.adapter.deltas.get(output.name, ()) for opened in self.inputs.adapters]
            if rule.use:
                tensors[output.name] = self._taken_from(output, rule.use) or tensor
            elif not rule.drop:
                tensors[output.name] = self._adapted(output, tensor, deltas, rule) if any(deltas) else tensor
        if self.missing:
            self._refuse_missing()
        check_vocabulary(tensors, base.checkpoint)
        return tensors, model.untied

    def _adapted(
        self, output: OutputTensor, base: LazyTensor, deltas: Sequence[tuple[WeightDelta, ...]], rule: Rule
    ) -> LazyTensor:
        name, method = output.name, self._method(rule, output.name, has_base=True)
        _check_count(method, len(deltas))
        inputs = [_adapter_input(opened, name) for opened in self.inputs.adapters]
        scopes = (rule.parameters, self.recipe.parameters)
        parameters = parameters_for(method, name, output.position, inputs, scopes, own_first=not rule.parameters)
        if method.name in FOLDS:
            return self._fold(name, base, deltas, _fold_weights(parameters))
        check_rows(name, base, deltas)
        self.summaries[name] = f"{method.name} of {len(deltas)} adapters' deltas"
        sources = tuple(AdapterDelta(base, group) for group in deltas)
        seed = self.recipe.random_seed
        return MergedTensor(base.info, method, sources, (False,) * len(sources), base, parameters, seed)

    def _fold(
        self, name: str, base: LazyTensor, deltas: Sequence[tuple[WeightDelta, ...]], weights: Sequence[float]
    ) -> LazyTensor:
        tensor, summary = fold_adapters(name, base, deltas, weights)
        if summary:
            self.summaries[name] = summary
        return tensor

    # models, with or without adapters

    def _compose_models(self) -> tuple[dict[str, LazyTensor], bool]:
        def has_rule(name: str) -> bool:
            return self._rule(name) is not _NO_RULE

        outputs, self.layer_stacks = output_tensors(self.recipe, self.models, has_rule)
        tensors = {output.name: tensor for output in outputs if (tensor := self._tensor(output)) is not None}
        if self.missing:
            self._refuse_missing()
        used = {id(source.model): source.model for output in outputs for source in output.group.sources}
        if self.recipe.base_model:
            used.setdefault(id(self._base()), self._base())
        untied = any(model.untied or splits_a_tie(model, tensors) for model in used.values())
        if self.layer_stacks and not untied and all(model.ties for model in used.values()):
            self._note_tie_across_slices(outputs)
        return tensors, untied

    def _note_tie_across_slices(self, outputs: Sequence[OutputTensor]) -> None:
        """A tied head follows the first slice's embedding, though the last slice's layers come before it."""
        first, last = outputs[0].group.sources[0], outputs[-1].group.sources[0]
        if first.model is not last.model:
            text = f"the head is tied to the embedding of {first.label}, after layers of {last.label}"
            self.notes.append(f"{text} (as in mergekit)")

    def _tensor(self, output: OutputTensor) -> LazyTensor | None:
        """One output tensor; None where a rule drops it, or some input lacks it."""
        rule = self._rule(output.name)
        if rule.drop:
            return None
        if rule.use:
            return self._taken_from(output, rule.use)
        if is_buffer_of_some(output):
            return self._buffer(output)
        step = self._merge_step(output, rule)
        sources = [self._source_tensor(source, output) for source in step.sources]
        base = self._source_tensor(step.base, output) if step.base else None
        if None in sources or (step.base and base is None):
            return None
        return self._merged(output, step, [tensor for tensor in sources if tensor], base, rule)

    def _buffer(self, output: OutputTensor) -> LazyTensor | None:
        """The reference model's buffer; None if it has none, as its class computes it."""
        reference = output.group.base or output.group.sources[0]
        tensor = reference.model.tensor(output.name_in(reference))
        kind = ".".join(output.name.split(".")[-2:])
        if tensor is None:
            text = f"buffers ({kind}) that {reference.label} does not store are left out: its class computes them"
        else:
            text = f"buffers ({kind}) are taken from {reference.label}: other models do not store them"
            self.summaries[output.name] = f"taken from {reference.label}"
        if text not in self.notes:
            self.notes.append(text)
        return renamed_tensor(tensor, output.name) if tensor else None

    def _source_tensor(self, source: SourceModel, output: OutputTensor) -> LazyTensor | None:
        """A source's tensor, under its output name; records it if the source lacks it."""
        name = output.name_in(source)
        tensor = source.model.tensor(name)
        if tensor is None:
            self.missing.setdefault(source.label, {})[name] = None
            return None
        return renamed_tensor(tensor, output.name)

    def _taken_from(self, output: OutputTensor, entry: ModelEntry) -> LazyTensor | None:
        """The tensor of one model, unchanged."""
        label = str(self.recipe.base_model) if str(entry) == "base" else str(entry)
        if label not in self.models:
            raise RecipeError(f"'use: {entry}' needs a base_model", hint="name one, or use one of the models")
        source = next((source for source in output.group.all_sources if source.label == label), None)
        if source is None and output.layer >= 0:
            text = f"'use: {entry}' at {output.name}: the slice of that layer does not say which of its layers to use"
            raise RecipeError(text, hint="list it among the slice's sources")
        tensor = self._source_tensor(source or SourceModel(label, self.models[label], {}), output)
        if tensor is not None:
            self.summaries[output.name] = f"taken from {label}"
        return tensor

    def _merge_step(self, output: OutputTensor, rule: Rule) -> _MergeStep:
        key = (id(output.group), id(rule))
        if key not in self._steps:
            self._steps[key] = self._new_merge_step(output, rule)
        return self._steps[key]

    def _new_merge_step(self, output: OutputTensor, rule: Rule) -> _MergeStep:
        group = output.group
        if rule.models:
            base = self.recipe.base_model
            is_recipes_base = group.base is not None and group.base.label == str(base)
            group = merge_group(rule.models, base if is_recipes_base else None, group.scopes, self.models)
        method = self._method(rule, output.name, group.base is not None)
        sources, base_source = self._method_inputs(method, group)
        adapters = self.inputs.adapters
        _check_count(method, len(sources) + len(adapters))
        return _MergeStep(method, tuple(sources), base_source, (rule.parameters, *group.scopes), adapters)

    def _method_inputs(self, method: Method, group: MergeGroup) -> tuple[list[SourceModel], SourceModel | None]:
        """The models that are the method's inputs, in its order, and the base of task vectors."""
        sources, base = list(group.sources), group.base
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
        if not listed and not group.layer_count and self._counts_base(method, len(sources)):
            return [*sources, base], None
        if not listed and not group.layer_count:
            self.notes.append("base_model provides names, config and tokenizer only; its weights are not merged")
        return sources, None

    def _counts_base(self, method: Method, others: int) -> bool:
        """Whether an unlisted base is one more input, as in mergekit: if the recipe gives it parameters."""
        required = (param.name for param in method.parameters.values() if param.per_input and param.required)
        return others < method.inputs[1] and all(name in self.recipe.parameters for name in required)

    def _refuse_missing(self) -> None:
        """Raise SourceError: which model lacks which tensors."""
        label, names = next(iter(self.missing.items()))
        owners = [model.label for model in self.models.values() if any(name in model.tensors for name in names)]
        text = f"{label} lacks {format_list(names)}, which {format_list(sorted(owners), 3)} has"
        hint = "merge models of one architecture; or add rules: [{match: ..., use: MODEL}] or drop: true"
        if any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in names):
            hint = "experts are stacked only if all are of one dtype and not quantized: save both models alike"
        raise SourceError(text, hint=hint)

    def _merged(
        self, output: OutputTensor, step: _MergeStep, models: Sequence[LazyTensor], base: LazyTensor | None, rule: Rule
    ) -> LazyTensor:
        name, method = output.name, step.method
        reference = base or models[0]
        labels = [source.label for source in step.sources]
        for tensor, label in zip(models, labels, strict=True):
            self._check_shape(name, tensor, label, reference)
        if not reference.info.is_float:
            return self._not_float(name, reference, models, labels)
        deltas = [opened.adapter.deltas.get(name, ()) for opened in step.adapters]
        inputs = [MethodInput(source.label, source.parameters, output.name_in(source)) for source in step.sources]
        inputs += [_adapter_input(opened, name) for opened in step.adapters]
        own_first = bool(rule.models) or not rule.parameters
        parameters = parameters_for(method, name, output.position, inputs, step.scopes, own_first=own_first)
        if method.on_deltas:
            assert base is not None
            check_rows(name, base, deltas)
            sources = (*models, *(AdapterDelta(base, group) for group in deltas))
            subtract = (True,) * len(models) + (False,) * len(deltas)
            if not sources:
                return base
        else:
            adapted = self._fold_each_adapter(name, deltas)
            sources, subtract = (*models, *adapted), (False,) * (len(models) + len(adapted))
        if method.name == "passthrough" and parameters["scale"][0] in (None, 1.0):
            self.summaries.pop(name, None)
            return sources[0]
        self.summaries[name] = f"{method.name} of {len(sources)}"
        start = base if method.on_deltas else None
        return MergedTensor(reference.info, method, sources, subtract, start, parameters, self.recipe.random_seed)

    def _fold_each_adapter(self, name: str, deltas: Sequence[tuple[WeightDelta, ...]]) -> list[LazyTensor]:
        """The base with each adapter alone folded in."""
        base = self._base().tensor(name) if deltas else None
        return [self._fold(name, base, [group], [1.0]) for group in deltas] if base else []

    def _check_shape(self, name: str, tensor: LazyTensor, label: str, reference: LazyTensor) -> None:
        shape, expected = tensor.info.shape, reference.info.shape
        if shape == expected:
            return
        text = f"{label}: {name} is {list(shape)}, not {list(expected)} as in {self.inputs.reference_model.label}"
        hint = "merge only models of the same shape"
        if shape[1:] == expected[1:] and name.rpartition(".")[0].endswith(_VOCABULARY):
            hint = "the vocabularies differ: 'tokenizer_source: union' (or base) maps their rows to each other"
        raise SourceError(text, hint=hint)

    def _not_float(
        self, name: str, reference: LazyTensor, models: Sequence[LazyTensor], labels: Sequence[str]
    ) -> LazyTensor:
        """Integers and booleans (position ids, counters, masks) are copied where all models agree on them."""
        first = _stored(reference)
        for tensor, label in zip(models, labels, strict=True):
            stored = _stored(tensor)
            if first is None or stored is None or first is stored or same_content(first, stored):
                continue
            hint = "take one model's: rules: [{match: ..., use: MODEL}]"
            if reference.info.bits == 8 and reference.info.dtype not in ("BOOL",):
                hint = "this quantized checkpoint cannot be merged: use its 16-bit version"
            text = f"{name} is {reference.info.dtype}, not a float, and differs in {label}: it cannot be averaged"
            raise SourceError(text, hint=hint)
        self.summaries[name] = "copied (not a float)"
        return reference


def _stored(tensor: LazyTensor) -> StoredTensor | None:
    while not isinstance(tensor, StoredTensor) and len(tensor.inputs) == 1:
        tensor = tensor.inputs[0]
    return tensor if isinstance(tensor, StoredTensor) else None


def _adapter_input(opened: OpenAdapter, name: str) -> MethodInput:
    return MethodInput(opened.adapter.label, {"weight": opened.entry.weight, **opened.entry.parameters}, name)


def _check_count(method: Method, count: int) -> None:
    low, high = method.inputs
    if not low <= count <= high:
        expected = f"exactly {low}" if low == high else f"at least {low}"
        raise RecipeError(f"{method.name} takes {expected} inputs; the recipe gives {count}")


def _fold_weights(parameters: Mapping[str, Any]) -> list[float]:
    weights = parameters["weight"]
    divisor = sum(weights) if parameters["normalize"] and abs(sum(weights)) >= 1e-8 else 1.0
    return [weight * parameters.get("lambda", 1.0) / divisor for weight in weights]
