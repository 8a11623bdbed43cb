"""Checks of a whole recipe: keys that exclude or require each other, and what its methods need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mergeforge.core.messages import WarningText
from mergeforge.core.parameters import Parameter
from mergeforge.errors import Problem, did_you_mean, format_list
from mergeforge.recipe.builder import Builder, build_output
from mergeforge.recipe.method_parameters import MethodSignature, check_parameters, model_lists, parameter_notes
from mergeforge.recipe.model import ModelEntry, Recipe
from mergeforge.recipe.yaml_reader import Path, Positions

MMPROJ_TYPES = ("f16", "bf16", "f32", "q8_0")  # those of llama.cpp's converter


class KnownNames(Protocol):
    """The names that a recipe may use."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


class Validator:
    """Collects mistakes and builds the Recipe from validated values."""

    def __init__(self, places: Positions, problems: list[Problem]) -> None:
        self.positions = places
        self.problems = problems
        self.warnings: dict[tuple[str, str], list[str]] = {}  # a warning and its hint -> the places

    def report(self, path: Path, message: str, hint: str = "") -> None:
        """Collect a mistake, at the position of the nearest enclosing value that has one."""
        self.problems.append(Problem(*self._position(path), message, hint))

    def warn(self, path: Path, message: str, hint: str = "") -> None:
        """Collect a warning; the same one at several places is one warning."""
        line, _ = self._position(path)
        place = ".".join(map(str, self._written(path))) + (f" in line {line}" if line else "")
        self.warnings.setdefault((message, hint), []).append(place)

    def _position(self, path: Path) -> tuple[int, int]:
        known_path = self._written(path)
        while known_path and known_path not in self.positions:
            known_path = known_path[:-1]
        return self.positions.get(known_path, (0, 0))

    def _written(self, path: Path) -> Path:
        """The path of a value as the user wrote it: a weight is one of an entry's parameters, or stands beside them."""
        beside = tuple(part for part in path if part != "parameters")
        return beside if path not in self.positions and beside in self.positions else path

    def warning_texts(self) -> tuple[WarningText, ...]:
        return tuple(
            WarningText(f"{message}: {hint} ({format_list(places)})")
            for (message, hint), places in self.warnings.items()
        )

    def recipe(self, value: Mapping[str, Any], raw: Any, methods: Mapping[str, MethodSignature]) -> Recipe | None:
        if not isinstance(raw, Mapping):
            return None
        build, base = Builder(self.report, self.warn), value.get("base_model")
        recipe = Recipe(
            merge_method=value.get("merge_method") or ("" if self._needs_no_method(value) else "fold"),
            base_model=build.model({"model": base}, ("base_model",)) if base else None,
            models=build.models(value, ()),
            adapters=tuple(
                build.adapter(item, ("adapters", index)) for index, item in enumerate(value.get("adapters") or [])
            ),
            parameters=value.get("parameters") or {},
            dtype=value.get("dtype"),
            out_dtype=value.get("out_dtype"),
            random_seed=value.get("random_seed") or 0,
            output=build_output(value.get("output") or {}),
            raw=raw,
            name=value.get("name"),
            slices=build.slices(value, ()),
            modules=tuple(build.module(name, item) for name, item in (value.get("modules") or {}).items()),
            rules=tuple(build.rule(item, ("rules", index)) for index, item in enumerate(value.get("rules") or [])),
            tokenizer=build.tokenizer(value),
            chat_template=value.get("chat_template"),
            base_numerics=value.get("base_numerics") or "original",
            stream_inputs=bool(value.get("stream_inputs")),
            allow_mismatch=bool(value.get("allow_mismatch")),
        )
        self._check_output(recipe)
        self._check_whole(value, recipe)
        known = self._check_methods(recipe, methods)
        if known is not None:
            check_parameters(recipe, known, methods, self.report, self.warn)
        return replace(recipe, notes=(*self.warning_texts(), *parameter_notes(recipe)))

    def _needs_no_method(self, value: Mapping[str, Any]) -> bool:
        """Whether rules may handle every tensor: there are rules, and something other than adapters to merge."""
        return bool(value.get("rules")) and any(value.get(key) for key in ("models", "slices", "modules"))

    def check_stage(self, value: Mapping[str, Any], earlier_names: set[Any]) -> None:
        """Check a document whose result is not written: it needs a unique name, and no output."""
        name = value.get("name")
        if name is None:
            self.report((), "this document has no name", "only one document, the final result, may omit its name")
        if name is not None and name in earlier_names:
            self.report(("name",), f"two documents are named {name!r}", "give each document a unique name")
        if value.get("output"):
            self.report(("output",), "only the final document may have an output", "remove it")

    def _check_output(self, recipe: Recipe) -> None:
        output = recipe.output
        if output.safetensors is False and not (output.gguf or output.mmproj or output.adapter):
            self.report(
                ("output", "safetensors"), "nothing would be written", "add output.gguf, or remove 'safetensors: false'"
            )
        if output.mmproj and output.mmproj not in MMPROJ_TYPES:
            hint = "one of: " + ", ".join(MMPROJ_TYPES)
            self.report(("output", "mmproj"), f"an mmproj file cannot have the type '{output.mmproj}'", hint)
        if output.converter and not (output.gguf and output.safetensors):
            hint = "add output.gguf, and leave out 'safetensors: false'"
            self.report(
                ("output", "converter"), "llama.cpp's converter makes GGUF files from the merged safetensors", hint
            )
        if output.converter and output.publish and output.publish.stream:
            text = "llama.cpp's converter needs the merged files, but stream: true removes each when it is uploaded"
            self.report(("output", "converter"), text, "remove 'stream', or 'converter'")
        if output.fp8 and not output.safetensors:
            self.report(("output", "fp8"), "fp8 needs safetensors output", "remove 'fp8' or 'safetensors: false'")
        if output.adapter and not recipe.adapters:
            hint = "list them under 'adapters'; `mergeforge extract-lora` makes an adapter from a model"
            self.report(("output", "adapter"), "there are no adapters to combine", hint)
        if output.adapter and recipe.model_lists:
            self.report(
                ("output", "adapter"), "models cannot be combined into an adapter", "remove 'models' or 'adapter'"
            )
        if output.adapter and output.adapter.energy is not None and not 0 < output.adapter.energy <= 1:
            self.report(("output", "adapter", "energy"), "'energy' must be in (0, 1]")

    def check_gguf(self, value: Mapping[str, Any], gguf_types: KnownNames) -> None:
        """Check that every GGUF type is known, and that no two files have the same name."""
        seen: set[str] = set()
        for index, entry in enumerate((value.get("output") or {}).get("gguf") or []):
            path: Path = ("output", "gguf", index)
            name = str(entry.get("type", "")).lower()
            if name and name not in gguf_types:
                hint = did_you_mean(name, gguf_types) or "known: " + ", ".join(gguf_types)
                self.report(path, f"unknown GGUF type '{entry['type']}'", hint)
            if name in seen:
                self.report(path, f"two GGUF files of type {name}", "list each type once")
            seen.add(name)

    def _check_whole(self, value: Mapping[str, Any], recipe: Recipe) -> None:
        forms = [key for key in ("models", "slices", "modules") if value.get(key) is not None]
        if not forms and value.get("adapters") is None:
            self.report((), "nothing to merge", "give models, slices or adapters")
        if len(forms) > 1:
            self.report((forms[1],), f"the recipe has both {forms[0]} and {forms[1]}", "keep one of them")
        if forms and "merge_method" not in value and not recipe.rules:
            self.report((), "merge_method is missing", "only a recipe with nothing but adapters may omit it")
        if recipe.adapters and recipe.base_model is None and not recipe.only_adapters:
            self.report(("adapters",), "adapters need a base_model", "set it to the model that they were trained on")
        if recipe.adapters and (recipe.slices or recipe.modules):
            form = "slices" if recipe.slices else "modules"
            text = f"top-level adapters cannot be used with {form}"
            self.report(("adapters",), text, f"list them under the models of the {form}")
        for path, entries in model_lists(recipe):
            self._check_duplicates(path, entries)
        self._check_same_adapters(recipe)
        for index, rule in enumerate(recipe.rules):
            if rule.models and (recipe.slices or recipe.modules):
                text = "a rule cannot list models in a recipe with slices or modules"
                self.report(("rules", index, "models"), text, "give the rule parameters only")

    def _check_duplicates(self, path: Path, entries: Sequence[ModelEntry]) -> None:
        seen: set[str] = set()
        for index, entry in enumerate(entries):
            if str(entry) in seen:
                self.report((*path, index), f"'{entry}' is listed twice", "add up its weights and list it once")
            seen.add(str(entry))

    def _check_same_adapters(self, recipe: Recipe) -> None:
        """Check that a model which is listed several times has the same adapters each time."""
        first: dict[str, ModelEntry] = {}
        for path, entries in model_lists(recipe):
            for index, entry in enumerate(entries):
                if first.setdefault(str(entry), entry).adapters != entry.adapters:
                    text = f"the adapters of '{entry}' have different weights here than above"
                    self.report((*path, index), text, "move one of them to a separate, named document")

    def _check_methods(self, recipe: Recipe, methods: Mapping[str, MethodSignature]) -> dict[str, Parameter] | None:
        """The parameters that the recipe's methods take; None if a method is unknown."""
        used: list[tuple[Path, str]] = [(("merge_method",), recipe.merge_method)] if recipe.merge_method else []
        used += [
            (("rules", index, "merge_method"), rule.merge_method)
            for index, rule in enumerate(recipe.rules)
            if rule.merge_method
        ]
        is_known = [self._check_method(path, name, recipe, methods) for path, name in used]
        if not all(is_known):
            return None
        return {key: parameter for _, name in used for key, parameter in methods[name].parameters.items()}

    def _check_method(self, path: Path, name: str, recipe: Recipe, methods: Mapping[str, MethodSignature]) -> bool:
        if name not in methods:
            hint = did_you_mean(name, methods) or "known: " + ", ".join(methods)
            self.report(path, f"unknown merge method '{name}'", hint)
            return False
        slices = [*recipe.slices, *(slice_ for module in recipe.modules for slice_ in module.slices)]
        has_base = (
            bool(recipe.base_model) or recipe.only_adapters or (bool(slices) and all(slice_.base for slice_ in slices))
        )
        if methods[name].needs_base and not has_base:
            hint = "set it to the model that the others were fine-tuned from"
            if methods[name].base_is_input:
                hint = "set it to one of the two models; the merge starts from it"
            self.report(path, f"{name} needs a base_model", hint)
        return True
