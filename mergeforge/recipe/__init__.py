"""Recipe: what a merge is to do, read strictly from YAML or a dict.

mergekit's keys, plus `adapters` and `output`. Reading needs neither torch nor the models, and
reports every mistake of a file at once, each with its line and column.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any, Protocol

import yaml

from mergeforge.errors import Problem, RecipeError, did_you_mean
from mergeforge.parameters import Parameter
from mergeforge.recipe import text
from mergeforge.recipe.schema import (
    Anything,
    Choice,
    Flag,
    ListOf,
    MapOf,
    Record,
    Setting,
    Shape,
    Size,
    Text,
    Whole,
)
from mergeforge.recipe.settings import scalars

__all__ = ["AdapterEntry", "GGUFEntry", "ModelEntry", "ModelRef", "Output", "Recipe", "json_schema", "read"]

_LINE_BREAKS = set("\r\x85\u2028\u2029\ufeff")
# What `dtype` and `out_dtype` may be, as mergekit spells them, and the safetensors name of each.
OUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class ModelRef:
    """A local path or Hub repo id, with an optional revision (Hub only)."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter with its weight and the method's other parameters for it."""

    adapter: ModelRef
    weight: Any = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """A model, the adapters folded into it before anything else, and the method's parameters for it."""

    model: ModelRef
    adapters: tuple[AdapterEntry, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "+".join([str(self.model), *(str(entry.adapter) for entry in self.adapters)])


@dataclass(frozen=True)
class GGUFEntry:
    """A GGUF file to write: its mix of types (`q4_k_m`, ...), and what changes that mix.

    `tensor_types`: (part of a GGUF tensor's name or regular expression, type), first match wins.
    `split_max_size`: largest sum of tensor bytes of one file; 0: one file.
    """

    type: str
    imatrix: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    split_max_size: int = 0


@dataclass(frozen=True)
class Output:
    """Where the result goes, in which formats, and how it is split: `shard_size` in bytes.

    `gguf_from` "stored": GGUF is made from values rounded as safetensors would hold them.
    `gguf_pre` overrides what the tokenizer's structure says of its pre-tokenizer. `name` is what the
    model is called in file names and metadata (default: the folder's name).
    """

    path: str | None = None
    safetensors: bool = True
    shard_size: int = 5 * 10**9
    gguf: tuple[GGUFEntry, ...] = ()
    gguf_from: str = "float32"
    gguf_pre: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole merge, as the user wrote it; `raw` is the plain value that was read."""

    merge_method: str
    base_model: ModelEntry | None
    models: tuple[ModelEntry, ...]
    adapters: tuple[AdapterEntry, ...]
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    random_seed: int
    output: Output
    raw: Mapping[str, Any]

    def to_yaml(self) -> str:
        """YAML that reads back as this recipe."""
        text = yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)
        if not _LINE_BREAKS & set(text):
            return text
        return yaml.safe_dump(dict(self.raw), sort_keys=False)  # PyYAML does not escape these otherwise


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


_REVISION = Record({"path": Text(), "revision": Text()}, required=("path",), short="path")
_PARAMETERS = MapOf(Setting(), "the method's parameters: numbers, gradients or filters")
_ADAPTER = Record(
    {
        "adapter": Text("a PEFT adapter: a folder or Hub repo id, with optional @revision"),
        "weight": Setting("a number, a gradient over the layers, or filters (default 1)"),
        "parameters": _PARAMETERS,
    },
    required=("adapter",),
    short="adapter",
)
_MODEL_REF = Record({"model": _REVISION, "lora": _REVISION}, required=("model",), short="model")
_MODEL = Record(
    {
        "model": _MODEL_REF,
        "adapters": ListOf(_ADAPTER, "adapters folded into this model first"),
        "parameters": _PARAMETERS,
    },
    required=("model",),
    short="model",
)
_FOLD_WEIGHT = Parameter("weight", "float", per_input=True, required=False, default=1.0, within=None)
_DTYPE = Choice(tuple(OUT_DTYPES))
_GGUF = Record(
    {
        "type": Text("q4_k_m, q8_0, f16, ...: see `mergeforge list quants`"),
        "imatrix": Text("an importance matrix: GGUF or .dat"),
        "tensor_types": MapOf(Text(), "GGUF tensor name (part or regular expression) -> type"),
        "output_tensor_type": Text("the type of output.weight"),
        "token_embedding_type": Text("the type of token_embd.weight"),
        "pure": Flag("every tensor in the main type"),
        "split_max_size": Size("largest size of one file, e.g. 4GB"),
    },
    required=("type",),
    short="type",
)
_OUTPUT = Record(
    {
        "path": Text("the folder to write"),
        "safetensors": Flag("false: only GGUF, no other copy on disk at any time"),
        "shard_size": Size("largest size of one safetensors file, e.g. 5GB"),
        "gguf": ListOf(_GGUF, "GGUF files to write, by their types: q4_k_m, q8_0, f16, ...", lone=True),
        "gguf_from": Choice(("float32", "stored"), "what is quantised: the merged float32 values, or them as stored"),
        "gguf_pre": Text("the pre-tokenizer's name in GGUF, where its structure does not tell"),
        "name": Text("what the model is called in GGUF file names and metadata (default: the folder's name)"),
        "adapter": Anything(),
        "publish": Anything(),
    }
)
_FIELDS: dict[str, Shape] = {
    "merge_method": Text("fold, linear, slerp, ties, ...: see `mergeforge list methods`"),
    "base_model": _MODEL_REF,
    "models": ListOf(_MODEL, "the models to merge"),
    "adapters": ListOf(_ADAPTER, "PEFT adapters of base_model"),
    "parameters": _PARAMETERS,
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "tokenizer_source": Text(),
    "random_seed": Whole(0, "seed of dare's random masks (default 0)"),
    "output": _OUTPUT,
    "slices": Anything(),
    "modules": Anything(),
    "tokenizer": Anything(),
    "chat_template": Anything(),
    "name": Anything(),
}
RECIPE = Record(_FIELDS, about="a mergeforge recipe")
# Keys of the recipe's language that this version reads but cannot carry out.
_NOT_YET = (
    ("slices",),
    ("modules",),
    ("tokenizer",),
    ("chat_template",),
    ("name",),
    ("output", "adapter"),
    ("output", "publish"),
)


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
        tensor_types=tuple((entry.get("tensor_types") or {}).items()),
        output_type=entry.get("output_tensor_type"),
        embedding_type=entry.get("token_embedding_type"),
        pure=bool(entry.get("pure")),
        split_max_size=entry.get("split_max_size") or 0,
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mergeforge recipe"} | RECIPE.json()


def read(
    source: str | FilePath | Mapping[str, Any] | Recipe,
    methods: Mapping[str, Method] | Any,
    sets: tuple[str, ...] = (),
    mixes: Known = (),
) -> Recipe:
    """Read a recipe from a file, a dict or a Recipe; `sets` are PATH=VALUE overrides.

    `methods` and `mixes`: the merge methods and GGUF types that there are.

    Raises RecipeError with every mistake that was found.
    """
    if isinstance(source, Recipe):
        source = source.raw
    name = "the recipe"
    places: text.Places = {}
    problems: list[Problem] = []
    if isinstance(source, Mapping):
        value: Any = _plain(source)
    else:
        name = str(source)
        value, places, problems = text.parse(_file_text(FilePath(source)), name)
    for override in sets:
        value = _override(value, override, places)
    checker = _Checker(places, problems)
    read_value = RECIPE.read(value, (), checker.report)
    recipe = checker.recipe(read_value, value, methods)
    checker.check_gguf(read_value, mixes)
    if checker.problems or recipe is None:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(checker.problems)))
    return recipe


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


def _plain(value: Any) -> Any:
    """A dict from Python as YAML would give it: numbers of NumPy, tuples and paths become plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _file_text(path: FilePath) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(text.LARGEST_FILE + 1)
        if len(data) > text.LARGEST_FILE:
            raise RecipeError(f"{path} is larger than 1 MiB", hint="a recipe is a few dozen lines")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", hint="`mergeforge init` writes one to start from") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _override(value: Any, override: str, places: text.Places) -> Any:
    """`value` with PATH=VALUE set; list items by index (`adapters.0.weight=0.5`)."""
    path, equals, written = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write PATH=VALUE, such as --set adapters.0.weight=0.5")
    return _with(value, path.split("."), text.scalar(written), override)


def _with(value: Any, path: list[str], new: Any, override: str) -> Any:
    if not path:
        return new
    key, *rest = path
    if isinstance(value, list):
        if not key.isdecimal() or int(key) >= len(value):
            raise RecipeError(f"--set {override}: '{key}' is not an item of a list of {len(value)}")
        return [_with(item, rest, new, override) if at == int(key) else item for at, item in enumerate(value)]
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"--set {override}: '{key}' is inside {value!r}, which is not a mapping")
    return {**(value or {}), key: _with((value or {}).get(key), rest, new, override)}


class _Checker:
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
        for path in _NOT_YET:
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
