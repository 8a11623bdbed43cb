"""From values of the right shape to a Recipe: what only the whole can tell, every mistake with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, Protocol

from mergeforge.errors import Problem, did_you_mean
from mergeforge.parameters import Parameter
from mergeforge.recipe import text
from mergeforge.recipe.entries import (
    AdapterEntry,
    AdapterOutput,
    GGUFEntry,
    ModelEntry,
    ModelRef,
    Module,
    Output,
    Recipe,
    Rule,
    Slice,
    TokenEntry,
    TokenizerEntry,
)
from mergeforge.recipe.language import NOT_YET
from mergeforge.recipe.settings import scalars

# Of mergekit's parameters, those that never had an effect; accepted for any method.
WITHOUT_EFFECT = ("int8_mask",)
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
        recipe = Recipe(
            merge_method=value.get("merge_method") or ("" if self._needs_no_method(value) else "fold"),
            base_model=self._model({"model": base}, ("base_model",)) if base else None,
            models=self._models(value, ()),
            adapters=tuple(
                self._adapter(item, ("adapters", at)) for at, item in enumerate(value.get("adapters") or [])
            ),
            parameters=value.get("parameters") or {},
            dtype=value.get("dtype"),
            out_dtype=value.get("out_dtype"),
            random_seed=value.get("random_seed") or 0,
            output=_output(value.get("output") or {}),
            raw=raw,
            name=value.get("name"),
            slices=self._slices(value, ()),
            modules=tuple(self._module(name, item) for name, item in (value.get("modules") or {}).items()),
            rules=tuple(self._rule(item, ("rules", at)) for at, item in enumerate(value.get("rules") or [])),
            tokenizer=self._tokenizer(value),
            chat_template=value.get("chat_template"),
        )
        self._refuse_what_is_missing(value, recipe)
        self._check_whole(value, recipe)
        known = self._check_methods(recipe, methods)
        if known is not None:
            self._check_parameters(recipe, known, methods)
        return recipe

    def _needs_no_method(self, value: Mapping[str, Any]) -> bool:
        """Rules, and something other than adapters to merge: then every tensor may be left to the rules."""
        return bool(value.get("rules")) and any(value.get(key) for key in ("models", "slices", "modules"))

    def check_stage(self, value: Mapping[str, Any], before: set[Any]) -> None:
        """What holds of documents whose result is not written: a name of their own, and no output."""
        name = value.get("name")
        if name is None:
            self.report((), "this document has no name", "one document, the result, may go without")
        if name is not None and name in before:
            self.report(("name",), f"two documents are called {name!r}", "give each a name of its own")
        if value.get("output"):
            self.report(("output",), "this document's result is not written", "take it out")

    def _models(self, value: Mapping[str, Any], path: text.Path) -> tuple[ModelEntry, ...]:
        return tuple(self._model(item, (*path, "models", at)) for at, item in enumerate(value.get("models") or []))

    def _slices(self, value: Mapping[str, Any], path: text.Path) -> tuple[Slice, ...]:
        return tuple(self._slice(item, (*path, "slices", at)) for at, item in enumerate(value.get("slices") or []))

    def _slice(self, item: Mapping[str, Any], path: text.Path) -> Slice:
        sources = tuple(
            replace(self._model(one, (*path, "sources", at)), layers=one.get("layer_range"))
            for at, one in enumerate(item.get("sources") or [])
        )
        lengths = {one.layers[1] - one.layers[0] for one in sources if one.layers}
        if len(lengths) > 1:
            counts = ", ".join(str(one.layers[1] - one.layers[0]) for one in sources if one.layers)
            self.report(
                (*path, "sources"), f"the sources of a slice give {counts} layers", "they must give as many each"
            )
        base = item.get("base_model")
        base_entry = self._model({"model": base}, (*path, "base_model")) if base else None
        return Slice(sources, base_entry, item.get("parameters") or {})

    def _module(self, name: str, item: Mapping[str, Any]) -> Module:
        path: text.Path = ("modules", name)
        if bool(item.get("models")) == bool(item.get("slices")):
            self.report(path, f"the module {name!r} needs either models or slices")
        models, slices = self._models(item, path), self._slices(item, path)
        return Module(name, models, slices, item.get("parameters") or {})

    def _rule(self, item: Mapping[str, Any], path: text.Path) -> Rule:
        ways = [key for key in ("merge_method", "use", "drop") if item.get(key)]
        if len(ways) > 1:
            self.report(path, f"a rule has either {' or '.join(ways)}", "split it in two, or take one out")
        if not item or (not ways and not item.get("parameters") and not item.get("models")):
            self.report(path, "this rule changes nothing", "give it a merge_method, parameters, models, use or drop")
        if ways and ways[0] != "merge_method" and (item.get("parameters") or item.get("models")):
            self.report(path, f"a rule with '{ways[0]}' merges nothing", "take its parameters and models out")
        return Rule(
            match=tuple(pattern for pattern in item.get("match") or () if pattern),
            merge_method=item.get("merge_method"),
            models=self._models(item, path),
            parameters=item.get("parameters") or {},
            use=self._model({"model": item["use"]}, (*path, "use")) if item.get("use") else None,
            drop=bool(item.get("drop")),
        )

    def _tokenizer(self, value: Mapping[str, Any]) -> TokenizerEntry | None:
        short, full = value.get("tokenizer_source"), value.get("tokenizer")
        if short and full:
            self.report(("tokenizer_source",), "tokenizer_source and tokenizer say the same", "keep one of them")
        if not short and full is None:
            return None
        path: text.Path = ("tokenizer", "source") if full is not None else ("tokenizer_source",)
        source = short or (full or {}).get("source") or {"model": {"path": "union"}}
        entry = self._model({"model": source}, path)
        tokens = {
            token: self._token(item, ("tokenizer", "tokens", token))
            for token, item in ((full or {}).get("tokens") or {}).items()
        }
        named = str(entry) if str(entry) in ("union", "base") else entry
        return TokenizerEntry(named, tokens, (full or {}).get("pad_to_multiple_of"))

    def _token(self, item: Mapping[str, Any], path: text.Path) -> TokenEntry | None:
        source = item.get("source")
        if not source:
            if item.get("force"):
                self.report(path, "'force' needs a source", "a model, {kind: zero} or {kind: model_token, ...}")
            return None
        kind = source.get("kind") or "model"
        model = self._model({"model": source["model"]}, (*path, "source")) if source.get("model") else None
        given = [key for key in ("token", "token_id") if source.get(key) is not None]
        if kind != "zero" and model is None:
            self.report((*path, "source"), "a token's source needs a model", "or kind: zero")
        if len(given) != (kind == "model_token"):
            wanted = "either token or token_id" if kind == "model_token" else "neither token nor token_id"
            self.report((*path, "source"), f"a source of the kind {kind} takes {wanted}")
        return TokenEntry(kind, model, source.get("token"), source.get("token_id"), bool(item.get("force")))

    def _model(self, item: Mapping[str, Any], path: text.Path) -> ModelEntry:
        """`item`: a checked {model, adapters, parameters}."""
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
        output = recipe.output
        if output.safetensors is False and not output.gguf and not output.adapter:
            self.report(("output", "safetensors"), "nothing would be written", "add output.gguf, or take this out")
        if output.adapter and not recipe.adapters:
            hint = "it joins what stands under 'adapters'; extract-lora makes one of a model"
            self.report(("output", "adapter"), "there are no adapters to join", hint)
        if output.adapter and recipe.lists:
            self.report(("output", "adapter"), "models cannot be joined into an adapter", "take 'models' out, or this")
        if output.adapter and output.adapter.energy is not None and not 0 < output.adapter.energy <= 1:
            self.report(("output", "adapter", "energy"), "'energy' must lie in (0, 1]")

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
        forms = [key for key in ("models", "slices", "modules") if value.get(key) is not None]
        if not forms and value.get("adapters") is None:
            self.report((), "nothing to merge", "give models, slices or adapters")
        if len(forms) > 1:
            self.report((forms[1],), f"the recipe has both {forms[0]} and {forms[1]}", "keep one of them")
        if forms and "merge_method" not in value and not recipe.rules:
            self.report((), "merge_method is missing", "only a recipe with adapters alone may leave it out")
        if recipe.adapters and recipe.base_model is None:
            self.report(("adapters",), "adapters need a base_model", "name the model that they were trained on")
        if recipe.adapters and (recipe.slices or recipe.modules):
            self.report(("adapters",), "adapters and slices do not go together", "list them under the slices' models")
        for path, entries in _lists(recipe):
            self._check_twice(path, entries)
        for at, rule in enumerate(recipe.rules):
            if rule.models and (recipe.slices or recipe.modules):
                self.report(
                    ("rules", at, "models"), "a rule's models have no layer_range", "give the rule parameters only"
                )

    def _check_twice(self, path: text.Path, entries: Sequence[ModelEntry]) -> None:
        seen: set[str] = set()
        for at, entry in enumerate(entries):
            if str(entry) in seen:
                self.report((*path, at), f"'{entry}' is listed twice", "add its weights and list it once")
            seen.add(str(entry))

    def _check_methods(self, recipe: Recipe, methods: Mapping[str, Method]) -> dict[str, Parameter] | None:
        """The parameters that the recipe's methods take; None where a method is unknown."""
        found: list[tuple[text.Path, str]] = [(("merge_method",), recipe.merge_method)] if recipe.merge_method else []
        found += [
            (("rules", at, "merge_method"), one.merge_method) for at, one in enumerate(recipe.rules) if one.merge_method
        ]
        good = [self._check_method(path, name, recipe, methods) for path, name in found]
        return {key: one for _, name in found for key, one in methods[name].parameters.items()} if all(good) else None

    def _check_method(self, path: text.Path, name: str, recipe: Recipe, methods: Mapping[str, Method]) -> bool:
        if name not in methods:
            hint = did_you_mean(name, methods) or "known: " + ", ".join(methods)
            self.report(path, f"unknown merge method '{name}'", hint)
            return False
        slices = [*recipe.slices, *(one for module in recipe.modules for one in module.slices)]
        bases = bool(recipe.base_model) or (bool(slices) and all(one.base for one in slices))
        if methods[name].needs_base and not bases:
            self.report(path, f"{name} needs a base_model", "name the model that the others were tuned from")
        return True

    def _check_parameters(self, recipe: Recipe, known: Mapping[str, Parameter], methods: Mapping[str, Method]) -> None:
        """`known`: the parameters of every method that the recipe uses."""
        name = recipe.method_name
        for path, settings in _shared_settings(recipe):
            self._check_settings(settings, (*path, "parameters"), known, per_input=False, method=name)
        for path, entries in _lists(recipe):
            for at, model in enumerate(entries):
                self._check_settings(model.parameters, (*path, at, "parameters"), known, True, name)
        for at, rule in enumerate(recipe.rules):
            own = methods[rule.merge_method].parameters if rule.merge_method else known
            self._check_settings(rule.parameters, ("rules", at, "parameters"), own, False, rule.merge_method or name)
        for at, adapter in enumerate(recipe.adapters):
            path = ("adapters", at)
            self._check_settings(adapter.parameters, (*path, "parameters"), known, True, name)
            if "weight" in known:
                self._check_values(adapter.weight, (*path, "weight"), known["weight"])
            elif adapter.weight != 1:
                self.report((*path, "weight"), f"{name} has no parameter 'weight'", "take it out")
            if "weight" in adapter.parameters:
                self.report(
                    (*path, "parameters", "weight"), "an adapter's weight stands beside it", "move it up a level"
                )

    def _check_settings(
        self, settings: Mapping[str, Any], path: text.Path, known: Mapping[str, Parameter], per_input: bool, method: str
    ) -> None:
        for name, setting in settings.items():
            if name not in known and name in WITHOUT_EFFECT:
                continue
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


def _lists(recipe: Recipe) -> Iterator[tuple[text.Path, tuple[ModelEntry, ...]]]:
    """Every list of models that are merged with one another, and where it stands."""
    parts: list[tuple[text.Path, Any]] = [((), recipe)]
    parts += [(("modules", module.name), module) for module in recipe.modules]
    for path, part in parts:
        yield (*path, "models"), part.models
        for at, one in enumerate(part.slices):
            yield (*path, "slices", at, "sources"), one.sources
    for at, rule in enumerate(recipe.rules):
        yield ("rules", at, "models"), rule.models


def _shared_settings(recipe: Recipe) -> Iterator[tuple[text.Path, Mapping[str, Any]]]:
    """The parameters that stand for more than one model: the recipe's, a module's, a slice's."""
    parts: list[tuple[text.Path, Any]] = [((), recipe)]
    parts += [(("modules", module.name), module) for module in recipe.modules]
    for path, part in parts:
        yield path, part.parameters
        for at, one in enumerate(part.slices):
            yield (*path, "slices", at), one.parameters


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
        adapter=_adapter_output(value.get("adapter")),
    )


def _adapter_output(value: Mapping[str, Any] | None) -> AdapterOutput | None:
    if not value or value.get("all") is False:
        return None
    return AdapterOutput(value.get("rank"), value.get("energy"), value.get("dtype") or AdapterOutput.dtype)


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
