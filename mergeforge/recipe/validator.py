"""What only a whole recipe can tell: keys that exclude or need one another, parameters that its methods take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from mergeforge.core.parameters import Parameter
from mergeforge.errors import Problem, did_you_mean
from mergeforge.recipe import yaml_reader as text
from mergeforge.recipe.builder import Builder, check_values, output_of
from mergeforge.recipe.model import ModelEntry, Recipe

# Of mergekit's parameters, those that never had an effect; accepted for any method.
WITHOUT_EFFECT = ("int8_mask",)


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
        build, base = Builder(self.report), value.get("base_model")
        recipe = Recipe(
            merge_method=value.get("merge_method") or ("" if self._needs_no_method(value) else "fold"),
            base_model=build.model({"model": base}, ("base_model",)) if base else None,
            models=build.models(value, ()),
            adapters=tuple(
                build.adapter(item, ("adapters", at)) for at, item in enumerate(value.get("adapters") or [])
            ),
            parameters=value.get("parameters") or {},
            dtype=value.get("dtype"),
            out_dtype=value.get("out_dtype"),
            random_seed=value.get("random_seed") or 0,
            output=output_of(value.get("output") or {}),
            raw=raw,
            name=value.get("name"),
            slices=build.slices(value, ()),
            modules=tuple(build.module(name, item) for name, item in (value.get("modules") or {}).items()),
            rules=tuple(build.rule(item, ("rules", at)) for at, item in enumerate(value.get("rules") or [])),
            tokenizer=build.tokenizer(value),
            chat_template=value.get("chat_template"),
            base_numerics=value.get("base_numerics") or "original",
            stream_inputs=bool(value.get("stream_inputs")),
        )
        self._check_output(recipe)
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

    def _check_output(self, recipe: Recipe) -> None:
        output = recipe.output
        if output.safetensors is False and not output.gguf and not output.adapter:
            self.report(("output", "safetensors"), "nothing would be written", "add output.gguf, or take this out")
        if output.fp8 and not output.safetensors:
            self.report(("output", "fp8"), "only safetensors hold FP8, and none are written", "take one out")
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
        self._check_same_adapters(recipe)
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

    def _check_same_adapters(self, recipe: Recipe) -> None:
        """A model that is named several times must have the same adapters in it each time."""
        first: dict[str, ModelEntry] = {}
        for path, entries in _lists(recipe):
            for at, entry in enumerate(entries):
                if first.setdefault(str(entry), entry).adapters != entry.adapters:
                    text = f"'{entry}' has its adapters with other weights here than above"
                    self.report((*path, at), text, "give it a document and a name of its own")

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
                check_values(adapter.weight, (*path, "weight"), known["weight"], self.report)
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
                check_values(setting, (*path, name), known[name], self.report)


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
