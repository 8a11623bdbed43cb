"""From values of the right shape to a Recipe: what only the whole can tell, every mistake with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Protocol

from mergeforge.errors import Problem, did_you_mean
from mergeforge.parameters import Parameter
from mergeforge.recipe import text
from mergeforge.recipe.entries import AdapterEntry, GGUFEntry, ModelEntry, ModelRef, Output, Recipe
from mergeforge.recipe.language import NOT_YET
from mergeforge.recipe.settings import scalars

_FOLD_WEIGHT = Parameter("weight", "float", per_input=True, required=False, default=1.0, within=None)


class Known(Protocol):
    """Names that may be asked for."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


class Method(Protocol):
    """What reading a recipe has to know of a merge method."""

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...

    @property
    def needs_base(self) -> bool: ...


class Checker:
    """Collects mistakes and builds the Recipe from checked values."""

    def __init__(self, places: text.Places, problems: list[Problem]) -> None:
        self.places = places
        self.problems = problems

    def report(self, path: text.Path, message: str, hint: str = "") -> None:
        at = path
        while at and at not in self.places:
            at = at[:-1]
        line, column = self.places.get(at, (0, 0))
        self.problems.append(Problem(line, column, message, hint))

    def recipe(self, value: Mapping[str, Any], raw: Any, methods: Mapping[str, Method]) -> Recipe | None:
        if not isinstance(raw, Mapping):
            return None
        base = value.get("base_model")
        output = value.get("output") or {}
        recipe = Recipe(
            merge_method=value.get("merge_method") or "fold",
            base_model=self._model({"model": base}, ("base_model",)) if base else None,
            models=tuple(self._model(item, ("models", at)) for at, item in enumerate(value.get("models") or [])),
            adapters=tuple(
                self._adapter(item, ("adapters", at)) for at, item in enumerate(value.get("adapters") or [])
            ),
            parameters=value.get("parameters") or {},
            dtype=value.get("dtype"),
            out_dtype=value.get("out_dtype"),
            random_seed=value.get("random_seed") or 0,
            output=_output(output),
            raw=raw,
        )
        self._refuse_what_is_missing(value, recipe)
        self._check_whole(value, recipe)
        if self._check_method(recipe, methods):
            self._check_parameters(recipe, methods[recipe.merge_method].parameters)
        return recipe

    def _model(self, item: Mapping[str, Any], path: text.Path) -> ModelEntry:
        reference = item.get("model") or {}
        model, adapters = self._ref(reference.get("model") or {}, path)
        lora = reference.get("lora")
        if lora:
            adapters = (*adapters, self._ref(lora, path)[0])
        entries = [AdapterEntry(adapter) for adapter in adapters]
        entries += [self._folded(one, (*path, "adapters", at)) for at, one in enumerate(item.get("adapters") or [])]
        return ModelEntry(model, tuple(entries), item.get("parameters") or {})

    def _adapter(self, item: Mapping[str, Any], path: text.Path) -> AdapterEntry:
        reference, more = self._ref({"path": item.get("adapter")}, path)
        if more:
            self.report(path, f"'{item['adapter']}' is more than one adapter", "list each adapter on its own")
        return AdapterEntry(reference, item.get("weight", 1.0), item.get("parameters") or {})

    def _folded(self, item: Mapping[str, Any], path: text.Path) -> AdapterEntry:
        """An adapter inside a model takes a weight and nothing else: no method combines it."""
        entry = self._adapter(item, path)
        self._check_values(entry.weight, (*path, "weight"), _FOLD_WEIGHT)
        if entry.parameters:
            text = "an adapter inside a model is folded in by its weight alone"
            self.report((*path, "parameters"), text, "list it under the top 'adapters' to combine it")
        return entry

    def _ref(self, item: Mapping[str, Any], path: text.Path) -> tuple[ModelRef, tuple[ModelRef, ...]]:
        model, adapters = parse_ref(item.get("path") or "?")
        if item.get("revision"):
            model = ModelRef(model.path, item["revision"])
        if not model.path or not all(adapter.path for adapter in adapters):
            self.report(path, f"'{item.get('path')}' is not path[@revision][+adapter]")
        return model, adapters

    def _refuse_what_is_missing(self, value: Mapping[str, Any], recipe: Recipe) -> None:
        for path in NOT_YET:
            here: Any = value
            for key in path:
                here = (here or {}).get(key) if isinstance(here, Mapping) else None
            if here is not None:
                self.report(path, f"'{'.'.join(path)}' is not carried out by this version", "take it out for now")
        if recipe.output.safetensors is False and not recipe.output.gguf:
            self.report(("output", "safetensors"), "nothing would be written", "add output.gguf, or take this out")
        source = value.get("tokenizer_source")
        if source not in (None, "base"):
            self.report(
                ("tokenizer_source",), f"tokenizer_source {source!r} is not carried out by this version", "base"
            )

    def check_gguf(self, value: Mapping[str, Any], mixes: Known) -> None:
        """Every GGUF type is known, and no two files would have one name."""
        seen: set[str] = set()
        for at, entry in enumerate((value.get("output") or {}).get("gguf") or []):
            path: text.Path = ("output", "gguf", at)
            name = str(entry.get("type", "")).lower()
            if name and name not in mixes:
                hint = did_you_mean(name, mixes) or "known: " + ", ".join(mixes)
                self.report(path, f"unknown GGUF type '{entry['type']}'", hint)
            if name in seen:
                self.report(path, f"two GGUF files of the type {name}", "each type once")
            seen.add(name)

    def _check_whole(self, value: Mapping[str, Any], recipe: Recipe) -> None:
        if not any(value.get(key) is not None for key in ("models", "adapters", "slices", "modules")):
            self.report((), "nothing to merge", "give models, adapters or both")
        if recipe.models and "merge_method" not in value:
            self.report((), "merge_method is missing", "only a recipe with adapters alone may leave it out")
        if recipe.adapters and recipe.base_model is None:
            self.report(("adapters",), "adapters need a base_model", "name the model that they were trained on")
        seen: dict[str, int] = {}
        for at, entry in enumerate(recipe.models):
            if str(entry) in seen:
                self.report(("models", at), f"'{entry}' is listed twice", "add its weights and list it once")
            seen[str(entry)] = at

    def _check_method(self, recipe: Recipe, methods: Mapping[str, Method]) -> bool:
        name = recipe.merge_method
        if name not in methods:
            hint = did_you_mean(name, methods) or "known: " + ", ".join(methods)
            self.report(("merge_method",), f"unknown merge method '{name}'", hint)
            return False
        if methods[name].needs_base and recipe.base_model is None:
            self.report(
                ("merge_method",), f"{name} needs a base_model", "name the model that the others were tuned from"
            )
        return True

    def _check_parameters(self, recipe: Recipe, known: Mapping[str, Parameter]) -> None:
        self._check_settings(recipe.parameters, ("parameters",), known, per_input=False, method=recipe.merge_method)
        for at, model in enumerate(recipe.models):
            path: text.Path = ("models", at, "parameters")
            self._check_settings(model.parameters, path, known, per_input=True, method=recipe.merge_method)
        for at, adapter in enumerate(recipe.adapters):
            path = ("adapters", at)
            self._check_settings(adapter.parameters, (*path, "parameters"), known, True, recipe.merge_method)
            if "weight" in known:
                self._check_values(adapter.weight, (*path, "weight"), known["weight"])
            elif adapter.weight != 1:
                self.report((*path, "weight"), f"{recipe.merge_method} has no parameter 'weight'", "take it out")
            if "weight" in adapter.parameters:
                self.report(
                    (*path, "parameters", "weight"), "an adapter's weight stands beside it", "move it up a level"
                )

    def _check_settings(
        self, settings: Mapping[str, Any], path: text.Path, known: Mapping[str, Parameter], per_input: bool, method: str
    ) -> None:
        for name, setting in settings.items():
            if name not in known:
                hint = did_you_mean(name, known) or f"{method} takes: {', '.join(known) or 'none'}"
                self.report((*path, name), f"{method} has no parameter '{name}'", hint)
            elif per_input and not known[name].per_input:
                self.report(
                    (*path, name), f"'{name}' is one value for the whole merge", "move it to the top 'parameters'"
                )
            else:
                self._check_values(setting, (*path, name), known[name])

    def _check_values(self, setting: Any, path: text.Path, parameter: Parameter) -> None:
        for value in scalars(setting):
            if parameter.kind == "float" and isinstance(value, bool):
                self.report(path, f"'{parameter.name}' must be a number, not {str(value).lower()}")
            elif parameter.kind == "bool" and not isinstance(value, bool) and value not in (0, 1):
                self.report(path, f"'{parameter.name}' must be true or false, not {value}")
            elif parameter.within and not isinstance(value, bool) and value not in parameter.within:
                self.report(path, f"'{parameter.name}' must lie in {parameter.within}, not {value}")
            elif value != value or value in (float("inf"), float("-inf")):
                self.report(path, f"'{parameter.name}' must be a finite number, not {value}")


def parse_ref(written: str) -> tuple[ModelRef, tuple[ModelRef, ...]]:
    """`path[@revision][+adapter[@revision]]...` -> the model and its adapters.

    A text that is an existing path is that path, whatever characters are in it.
    """
    if _exists(written):
        return ModelRef(written), ()
    model, *adapters = (_revision(part.strip()) for part in written.split("+"))
    return model, tuple(adapters)


def _revision(part: str) -> ModelRef:
    if "@" not in part or _exists(part):
        return ModelRef(part)
    path, _, revision = part.partition("@")
    return ModelRef(path, revision or None)


def _exists(path: str) -> bool:
    try:
        return FilePath(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return False


def _output(value: Mapping[str, Any]) -> Output:
    """The checked `output` part of a recipe."""
    return Output(
        path=value.get("path"),
        safetensors=value.get("safetensors") is not False,
        shard_size=value.get("shard_size") or Output.shard_size,
        gguf=tuple(_gguf(entry) for entry in value.get("gguf") or []),
        gguf_from=value.get("gguf_from") or "float32",
        gguf_pre=value.get("gguf_pre"),
        name=value.get("name"),
    )


def _gguf(entry: Mapping[str, Any]) -> GGUFEntry:
    return GGUFEntry(
        type=str(entry.get("type") or "").lower(),
        imatrix=entry.get("imatrix"),
        tensor_types=tuple((str(name), kind) for name, kind in (entry.get("tensor_types") or {}).items()),
        output_type=entry.get("output_tensor_type"),
        embedding_type=entry.get("token_embedding_type"),
        pure=bool(entry.get("pure")),
        split_max_size=entry.get("split_max_size") or 0,
    )
