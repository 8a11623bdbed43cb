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
from mergeforge.planner.model_facts import DECISIVE, DOUBTFUL, facts, model_types, rope_facts
from mergeforge.planner.vocabulary_check import check_vocabularies
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
    decisive, doubtful = list[str](), list[str]()
    reference = inputs.reference_model
    for model in (model for model in merged if model is not reference):
        _compare(model.label, model.checkpoint.config, reference.label, reference.checkpoint.config, decisive, doubtful)
    for model, opened in _adapters_with_bases(inputs):
        _compare_adapter(model, opened, decisive, doubtful)
    if recipe.tokenizer is None:
        check_vocabularies(reference, merged, decisive, doubtful)
    if decisive and not recipe.allow_mismatch:
        raise SourceError("\n  ".join(["the inputs do not fit together:", *decisive]), hint=_INSIST)
    return [WarningText(text) for text in (*decisive, *doubtful)]


def _refuse_adapter_tensors(inputs: Inputs) -> None:
    for model in inputs.stored_models:
        names = [name for name in model.checkpoint.tensors if _ADAPTER_TENSOR.search(name)]
        if names:
            text = f"{model.label} is not a whole model: it holds tensors of an adapter ({format_list(names, 2)})"
            hint = "list an adapter under `adapters`; save a PEFT model with merge_and_unload().save_pretrained()"
            raise SourceError(text, hint=hint)


def _compare(
    label: str,
    config: Mapping[str, Any],
    other_label: str,
    other: Mapping[str, Any],
    decisive: list[str],
    doubtful: list[str],
) -> None:
    """Add what contradicts between the configs of two models."""
    types, other_types = model_types(config), model_types(other)
    if types and other_types and not types & other_types:
        decisive.append(f"{label} is a {_joined(types)} model, {other_label} a {_joined(other_types)} model")
        return
    for names, problems in ((DECISIVE, decisive), (DOUBTFUL, doubtful)):
        problems += _differences(label, facts(config, names), other_label, facts(other, names))
    doubtful += _differences(label, rope_facts(config), other_label, rope_facts(other))
    classes, other_classes = class_names(config), class_names(other)
    if classes and other_classes and classes != other_classes:
        doubtful.append(f"{label} is a {_joined(classes)}, {other_label} a {_joined(other_classes)}")


def _differences(label: str, values: Mapping[str, Any], other_label: str, others: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(values.keys() & others.keys()):
        if values[name] != others[name]:
            yield f"{name}: {_shown(values[name])} in {label}, {_shown(others[name])} in {other_label}"


def _adapters_with_bases(inputs: Inputs) -> Iterator[tuple[OpenModel, OpenAdapter]]:
    if inputs.base:
        yield from ((inputs.base, opened) for opened in inputs.adapters)
    for model in inputs.all_models:
        yield from ((model, opened) for opened in model.adapters)


def _compare_adapter(model: OpenModel, opened: OpenAdapter, decisive: list[str], doubtful: list[str]) -> None:
    """Compare an adapter's own base with the model that it is folded into, as far as the adapter tells what it is."""
    path = opened.adapter.folder / "adapter_config.json"
    settings = read_json(path) if path.is_file() else {}
    config = model.checkpoint.config
    label = f"the base of {opened.adapter.label}"
    trained_on = Path(str(settings.get("base_model_name_or_path") or "")) / "config.json"
    if trained_on.is_file() and not trained_on.samefile(model.checkpoint.folder / "config.json"):
        other = read_json(trained_on)
        if model_types(other) & model_types(config):
            _compare(label, other, model.label, config, doubtful, [])  # the path may lead to another model by now
        else:
            _compare(label, other, model.label, config, decisive, [])
        return
    mapping = settings.get("auto_mapping")
    trained_class = str(mapping.get("base_model_class") or "") if isinstance(mapping, Mapping) else ""
    classes = class_names(config)
    if trained_class and classes and _family(trained_class) not in map(_family, classes):
        decisive.append(f"{label} is a {trained_class}, {model.label} a {_joined(classes)}")


def _family(class_name: str) -> str:
    return _CLASS_SUFFIX.sub("", class_name)


def _joined(names: Any) -> str:
    return " / ".join(sorted(map(str, names)))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
