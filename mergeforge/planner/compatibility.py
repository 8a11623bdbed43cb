"""Whether models belong together: tensors of equal names and shapes can still mean different things.

A contradiction that makes the result meaningless is an error, unless the recipe has `allow_mismatch: true`; one that is
doubtful is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.names import class_names
from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError, format_list
from mergeforge.planner.inputs import Inputs, OpenAdapter, OpenModel
from mergeforge.planner.mismatches import Mismatches, all_mismatches
from mergeforge.planner.model_facts import decisive_facts, doubtful_facts, model_types
from mergeforge.planner.vocabulary_check import compare_vocabularies
from mergeforge.recipe import Recipe

_ADAPTER_TENSOR = re.compile(
    r"(^base_model\.model\.|\.base_layer\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b)"
)
_CLASS_SUFFIX = re.compile(r"(For[A-Z]\w+|LMHeadModel|DoubleHeadsModel|Model|PreTrainedModel)$")
_INSIST = "name models of one architecture; allow_mismatch: true merges them all the same"


def check_inputs(recipe: Recipe, inputs: Inputs, merged: Sequence[OpenModel]) -> list[WarningText]:
    """Compare the models that are merged, and the adapters with their bases. `merged`: without those for tokens only.

    Raises SourceError for contradictions that the recipe does not allow.
    """
    _refuse_adapter_tensors(inputs)
    reference = inputs.reference_model
    others = [model for model in merged if model is not reference]
    found = all_mismatches(_compare_models(model, reference) for model in others)
    found += all_mismatches(_compare_adapter(model, opened) for model, opened in _adapters_with_bases(inputs))
    if recipe.tokenizer is None:
        found += all_mismatches(compare_vocabularies(model, reference) for model in others)
    if found.decisive and not recipe.allow_mismatch:
        raise SourceError("\n  ".join(["the inputs do not fit together:", *found.decisive]), hint=_INSIST)
    return [WarningText(text) for text in (*found.decisive, *found.doubtful)]


def _refuse_adapter_tensors(inputs: Inputs) -> None:
    for model in inputs.stored_models:
        names = [name for name in model.checkpoint.tensors if _ADAPTER_TENSOR.search(name)]
        if names:
            text = f"{model.label} is not a whole model: it holds tensors of an adapter ({format_list(names, 2)})"
            hint = "list an adapter under `adapters`; save a PEFT model with merge_and_unload().save_pretrained()"
            raise SourceError(text, hint=hint)


def _compare_models(model: OpenModel, reference: OpenModel) -> Mismatches:
    return _compare(model.label, model.checkpoint.config, reference.label, reference.checkpoint.config)


def _compare(label: str, config: Mapping[str, Any], other_label: str, other: Mapping[str, Any]) -> Mismatches:
    """What contradicts between two configs."""
    types, other_types = model_types(config), model_types(other)
    if types and other_types and not types & other_types:
        text = f"{label} is a {_joined(types)} model, {other_label} a {_joined(other_types)} model"
        return Mismatches(decisive=(text,))
    decisive = list(_differences(label, decisive_facts(config), other_label, decisive_facts(other)))
    doubtful = list(_differences(label, doubtful_facts(config), other_label, doubtful_facts(other)))
    classes, other_classes = class_names(config), class_names(other)
    if classes and other_classes and classes != other_classes:
        doubtful.append(f"{label} is a {_joined(classes)}, {other_label} a {_joined(other_classes)}")
    return Mismatches(tuple(decisive), tuple(doubtful))


def _differences(label: str, values: Mapping[str, Any], other_label: str, others: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(values.keys() & others.keys()):
        if values[name] != others[name]:
            yield f"{name}: {_shown(values[name])} in {label}, {_shown(others[name])} in {other_label}"


def _adapters_with_bases(inputs: Inputs) -> Iterator[tuple[OpenModel, OpenAdapter]]:
    if inputs.base:
        yield from ((inputs.base, opened) for opened in inputs.adapters)
    for model in inputs.all_models:
        yield from ((model, opened) for opened in model.adapters)


def _compare_adapter(model: OpenModel, opened: OpenAdapter) -> Mismatches:
    """Compare an adapter's own base with the model that it is folded into, as far as the adapter tells what it is."""
    path = opened.adapter.folder / "adapter_config.json"
    settings = read_json(path) if path.is_file() else {}
    config, label = model.checkpoint.config, f"the base of {opened.adapter.label}"
    trained_on = _config_at(settings.get("base_model_name_or_path"))
    if trained_on is not None:
        found = _compare(label, trained_on, model.label, config)
        if model_types(trained_on) & model_types(config):
            return Mismatches(doubtful=found.decisive)  # by now, the path may lead to another model
        return found
    mapping = settings.get("auto_mapping")
    trained_class = str(mapping.get("base_model_class") or "") if isinstance(mapping, Mapping) else ""
    classes = class_names(config)
    if trained_class and classes and _family(trained_class) not in map(_family, classes):
        return Mismatches(decisive=(f"{label} is a {trained_class}, {model.label} a {_joined(classes)}",))
    return Mismatches()


def _config_at(path: Any) -> dict[str, Any] | None:
    """The config.json of a local model folder; None if there is none that can be read."""
    if not isinstance(path, str) or not path:
        return None
    try:
        return read_json(Path(path) / "config.json")
    except (SourceError, OSError, ValueError):
        return None


def _family(class_name: str) -> str:
    return _CLASS_SUFFIX.sub("", class_name)


def _joined(names: Any) -> str:
    return " / ".join(sorted(map(str, names)))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
