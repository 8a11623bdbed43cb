"""From values of the right shape to the recipe's parts: models, slices, modules, rules, tokenizers, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, Protocol

from mergeforge.core.parameters import Parameter
from mergeforge.recipe import yaml_reader as text
from mergeforge.recipe.model import (
    AdapterEntry,
    AdapterOutput,
    GGUFEntry,
    ModelEntry,
    ModelRef,
    Module,
    Output,
    Publish,
    Rule,
    Slice,
    TokenEntry,
    TokenizerEntry,
)
from mergeforge.recipe.parameter_values import scalars

_FOLD_WEIGHT = Parameter("weight", "float", per_input=True, required=False, default=1.0, within=None)


class Report(Protocol):
    """Takes a mistake: where it stands, what is wrong, what to do."""

    def __call__(self, path: text.Path, message: str, hint: str = "") -> None: ...


class Builder:
    """Builds the parts; what is wrong with one is reported at its place."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def models(self, value: Mapping[str, Any], path: text.Path) -> tuple[ModelEntry, ...]:
        return tuple(self.model(item, (*path, "models", at)) for at, item in enumerate(value.get("models") or []))

    def slices(self, value: Mapping[str, Any], path: text.Path) -> tuple[Slice, ...]:
        return tuple(self.slice(item, (*path, "slices", at)) for at, item in enumerate(value.get("slices") or []))

    def slice(self, item: Mapping[str, Any], path: text.Path) -> Slice:
        sources = tuple(
            replace(self.model(one, (*path, "sources", at)), layers=one.get("layer_range"))
            for at, one in enumerate(item.get("sources") or [])
        )
        lengths = {one.layers[1] - one.layers[0] for one in sources if one.layers}
        if len(lengths) > 1:
            counts = ", ".join(str(one.layers[1] - one.layers[0]) for one in sources if one.layers)
            self.report(
                (*path, "sources"), f"the sources of a slice give {counts} layers", "they must give as many each"
            )
        base = item.get("base_model")
        base_entry = self.model({"model": base}, (*path, "base_model")) if base else None
        return Slice(sources, base_entry, item.get("parameters") or {})

    def module(self, name: str, item: Mapping[str, Any]) -> Module:
        path: text.Path = ("modules", name)
        if bool(item.get("models")) == bool(item.get("slices")):
            self.report(path, f"the module {name!r} needs either models or slices")
        models, slices = self.models(item, path), self.slices(item, path)
        return Module(name, models, slices, item.get("parameters") or {})

    def rule(self, item: Mapping[str, Any], path: text.Path) -> Rule:
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
            models=self.models(item, path),
            parameters=item.get("parameters") or {},
            use=self.model({"model": item["use"]}, (*path, "use")) if item.get("use") else None,
            drop=bool(item.get("drop")),
        )

    def tokenizer(self, value: Mapping[str, Any]) -> TokenizerEntry | None:
        short, full = value.get("tokenizer_source"), value.get("tokenizer")
        if short and full:
            self.report(("tokenizer_source",), "tokenizer_source and tokenizer say the same", "keep one of them")
        if not short and full is None:
            return None
        path: text.Path = ("tokenizer", "source") if full is not None else ("tokenizer_source",)
        source = short or (full or {}).get("source") or {"model": {"path": "union"}}
        entry = self.model({"model": source}, path)
        tokens = {
            token: self.token(item, ("tokenizer", "tokens", token))
            for token, item in ((full or {}).get("tokens") or {}).items()
        }
        named = str(entry) if str(entry) in ("union", "base") else entry
        return TokenizerEntry(named, tokens, (full or {}).get("pad_to_multiple_of"))

    def token(self, item: Mapping[str, Any], path: text.Path) -> TokenEntry | None:
        source = item.get("source")
        if not source:
            if item.get("force"):
                self.report(path, "'force' needs a source", "a model, {kind: zero} or {kind: model_token, ...}")
            return None
        kind = source.get("kind") or "model"
        model = self.model({"model": source["model"]}, (*path, "source")) if source.get("model") else None
        given = [key for key in ("token", "token_id") if source.get(key) is not None]
        if kind != "zero" and model is None:
            self.report((*path, "source"), "a token's source needs a model", "or kind: zero")
        if len(given) != (kind == "model_token"):
            wanted = "either token or token_id" if kind == "model_token" else "neither token nor token_id"
            self.report((*path, "source"), f"a source of the kind {kind} takes {wanted}")
        return TokenEntry(kind, model, source.get("token"), source.get("token_id"), bool(item.get("force")))

    def model(self, item: Mapping[str, Any], path: text.Path) -> ModelEntry:
        """`item`: a checked {model, adapters, parameters}."""
        reference = item.get("model") or {}
        model, adapters = self.ref(reference.get("model") or {}, path)
        lora = reference.get("lora")
        if lora:
            adapters = (*adapters, self.ref(lora, path)[0])
        entries = [AdapterEntry(adapter) for adapter in adapters]
        entries += [self.folded(one, (*path, "adapters", at)) for at, one in enumerate(item.get("adapters") or [])]
        return ModelEntry(model, tuple(entries), item.get("parameters") or {})

    def adapter(self, item: Mapping[str, Any], path: text.Path) -> AdapterEntry:
        reference, more = self.ref({"path": item.get("adapter")}, path)
        if more:
            self.report(path, f"'{item['adapter']}' is more than one adapter", "list each adapter on its own")
        residual = bool(item.get("base_is_residual"))
        return AdapterEntry(reference, item.get("weight", 1.0), item.get("parameters") or {}, residual)

    def folded(self, item: Mapping[str, Any], path: text.Path) -> AdapterEntry:
        """An adapter inside a model takes a weight and nothing else: no method combines it."""
        entry = self.adapter(item, path)
        check_values(entry.weight, (*path, "weight"), _FOLD_WEIGHT, self.report)
        if entry.parameters:
            text = "an adapter inside a model is folded in by its weight alone"
            self.report((*path, "parameters"), text, "list it under the top 'adapters' to combine it")
        return entry

    def ref(self, item: Mapping[str, Any], path: text.Path) -> tuple[ModelRef, tuple[ModelRef, ...]]:
        model, adapters = parse_ref(item.get("path") or "?")
        if item.get("revision"):
            model = ModelRef(model.path, item["revision"])
        if not model.path or not all(adapter.path for adapter in adapters):
            self.report(path, f"'{item.get('path')}' is not path[@revision][+adapter]")
        return model, adapters


def check_values(setting: Any, path: text.Path, parameter: Parameter, report: Report) -> None:
    """Report the values of a setting that the parameter cannot have."""
    for value in scalars(setting):
        if parameter.kind == "float" and isinstance(value, bool):
            report(path, f"'{parameter.name}' must be a number, not {str(value).lower()}")
        elif parameter.kind == "bool" and not isinstance(value, bool) and value not in (0, 1):
            report(path, f"'{parameter.name}' must be true or false, not {value}")
        elif parameter.within and not isinstance(value, bool) and value not in parameter.within:
            report(path, f"'{parameter.name}' must lie in {parameter.within}, not {value}")
        elif value != value or value in (float("inf"), float("-inf")):
            report(path, f"'{parameter.name}' must be a finite number, not {value}")


def parse_ref(written: str) -> tuple[ModelRef, tuple[ModelRef, ...]]:
    """`path[@revision][+adapter[@revision]]...` -> the model and its adapters.

    A text that is an existing path is that path, whatever characters are in it.
    """
    if _exists(written):
        return ModelRef(written), ()
    model, *adapters = (_revision(part.strip()) for part in written.split("+"))
    return model, tuple(adapters)


def _revision(part: str) -> ModelRef:
    if "@" not in part or _exists(part) or ("://" in part and not part.startswith("hf://")):
        return ModelRef(part)
    path, _, revision = part.partition("@")
    return ModelRef(path, revision or None)


def _exists(path: str) -> bool:
    try:
        return FilePath(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return False


def output_of(value: Mapping[str, Any]) -> Output:
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
        publish=_publish(value.get("publish")),
        fp8=bool(value.get("fp8")),
    )


def _publish(value: Mapping[str, Any] | None) -> Publish | None:
    if not value or not value.get("repo"):
        return None
    private, revision = value.get("private") is not False, value.get("revision") or "main"
    return Publish(value["repo"], private, revision, bool(value.get("stream")))


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
