"""Builds the parts of a recipe from validated values: models, slices, modules, rules, tokenizers, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from mergeforge.core.parameters import Parameter
from mergeforge.recipe.keys import ENTRY_PARAMETERS
from mergeforge.recipe.model import (
    AdapterEntry,
    AdapterOutput,
    GGUFEntry,
    ModelEntry,
    ModelRef,
    ModuleEntry,
    Output,
    Publish,
    Rule,
    Slice,
    TokenEntry,
    TokenizerEntry,
)
from mergeforge.recipe.parameter_values import scalars
from mergeforge.recipe.schema import ReportProblem
from mergeforge.recipe.yaml_reader import Path

_FOLD_WEIGHT = Parameter("weight", "float", per_input=True, required=False, default=1.0, within=None)


class Builder:
    """Builds the parts; reports each mistake at its position, and what has no effect with `warn`."""

    def __init__(self, report: ReportProblem, warn: ReportProblem) -> None:
        self.report = report
        self.warn = warn

    def models(self, value: Mapping[str, Any], path: Path) -> tuple[ModelEntry, ...]:
        models = enumerate(value.get("models") or [])
        return tuple(self.model(item, (*path, "models", index)) for index, item in models)

    def slices(self, value: Mapping[str, Any], path: Path) -> tuple[Slice, ...]:
        slices = enumerate(value.get("slices") or [])
        return tuple(self.slice(item, (*path, "slices", index)) for index, item in slices)

    def slice(self, item: Mapping[str, Any], path: Path) -> Slice:
        sources = tuple(
            replace(self.model(source, (*path, "sources", index)), layers=source.get("layer_range"))
            for index, source in enumerate(item.get("sources") or [])
        )
        depths = [source.layers[1] - source.layers[0] for source in sources if source.layers]
        if len(set(depths)) > 1:
            self.report(
                (*path, "sources"),
                f"the sources of this slice have different numbers of layers: {', '.join(map(str, depths))}",
                "give each layer_range the same length",
            )
        if "residual_weight" in item:
            self.warn(
                (*path, "residual_weight"), "'residual_weight' has no effect", "mergekit reads it and never uses it"
            )
        base = item.get("base_model")
        base_entry = self.model({"model": base}, (*path, "base_model")) if base else None
        return Slice(sources, base_entry, item.get("parameters") or {})

    def module(self, name: str, item: Mapping[str, Any]) -> ModuleEntry:
        path: Path = ("modules", name)
        if bool(item.get("models")) == bool(item.get("slices")):
            self.report(path, f"the module {name!r} needs either 'models' or 'slices'")
        models, slices = self.models(item, path), self.slices(item, path)
        return ModuleEntry(name, models, slices, item.get("parameters") or {})

    def rule(self, item: Mapping[str, Any], path: Path) -> Rule:
        actions = [key for key in ("merge_method", "use", "drop") if item.get(key)]
        if len(actions) > 1:
            text = f"a rule can have only one of {', '.join(actions)}"
            self.report(path, text, "split it into several rules, or remove a key")
        if not item or (not actions and not item.get("parameters") and not item.get("models")):
            self.report(path, "this rule changes nothing", "add merge_method, parameters, models, use or drop")
        if actions and actions[0] != "merge_method" and (item.get("parameters") or item.get("models")):
            self.report(path, f"a rule with '{actions[0]}' takes no parameters or models", "remove them")
        return Rule(
            match=tuple(pattern for pattern in item.get("match") or () if pattern),
            merge_method=item.get("merge_method"),
            models=self.models(item, path),
            parameters=item.get("parameters") or {},
            use=self.model({"model": item["use"]}, (*path, "use")) if item.get("use") else None,
            drop=bool(item.get("drop")),
        )

    def tokenizer(self, value: Mapping[str, Any]) -> TokenizerEntry | None:
        shorthand, full = value.get("tokenizer_source"), value.get("tokenizer")
        if shorthand and full:
            self.report(("tokenizer_source",), "the recipe has both tokenizer_source and tokenizer", "keep one of them")
        if not shorthand and full is None:
            return None
        path: Path = ("tokenizer", "source") if full is not None else ("tokenizer_source",)
        source = shorthand or (full or {}).get("source") or {"model": {"path": "union"}}
        entry = self.model({"model": source}, path)
        tokens = {
            token: self.token(item, ("tokenizer", "tokens", token))
            for token, item in ((full or {}).get("tokens") or {}).items()
        }
        source_or_keyword = str(entry) if str(entry) in ("union", "base") else entry
        return TokenizerEntry(source_or_keyword, tokens, (full or {}).get("pad_to_multiple_of"))

    def token(self, item: Mapping[str, Any], path: Path) -> TokenEntry | None:
        source = item.get("source")
        if not source:
            if item.get("force"):
                self.report(
                    path, "'force' needs a source", "add 'source': a model, {kind: zero} or {kind: model_token, ...}"
                )
            return None
        kind = source.get("kind") or "model"
        model = self.model({"model": source["model"]}, (*path, "source")) if source.get("model") else None
        row_keys = [key for key in ("token", "token_id") if source.get(key) is not None]
        if kind != "zero" and model is None:
            self.report((*path, "source"), "a token's source needs a model", "add 'model', or use kind: zero")
        if len(row_keys) != (kind == "model_token"):
            allowed = "exactly one of token and token_id" if kind == "model_token" else "neither token nor token_id"
            self.report((*path, "source"), f"a source of kind {kind} takes {allowed}")
        return TokenEntry(kind, model, source.get("token"), source.get("token_id"), bool(item.get("force")))

    def model(self, item: Mapping[str, Any], path: Path) -> ModelEntry:
        """Build a model from a validated {model, adapters, parameters}."""
        reference = item.get("model") or {}
        if reference.get("override_architecture"):
            text = "tensors are merged by their names, whatever the architecture"
            self.warn((*path, "override_architecture"), "'override_architecture' has no effect", text)
        model, adapters = self.ref(reference.get("model") or {}, path)
        lora = reference.get("lora")
        if lora:
            adapters = (*adapters, self.ref(lora, path)[0])
        entries = [AdapterEntry(adapter) for adapter in adapters]
        own_adapters = enumerate(item.get("adapters") or [])
        entries += [self.folded_adapter(adapter, (*path, "adapters", index)) for index, adapter in own_adapters]
        return ModelEntry(model, tuple(entries), self._entry_parameters(item, path))

    def _entry_parameters(self, item: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The parameters of one model or adapter: those given on the entry itself, and its `parameters`."""
        parameters, own = item.get("parameters") or {}, {key: item[key] for key in ENTRY_PARAMETERS if key in item}
        for name in own:
            if name in parameters:
                self.report((*path, name), f"'{name}' is also among the parameters of this entry", "keep one of them")
        return {**parameters, **own}

    def adapter(self, item: Mapping[str, Any], path: Path) -> AdapterEntry:
        reference, further = self.ref({"path": item.get("adapter")}, path)
        if further:
            self.report(path, f"'{item['adapter']}' names more than one adapter", "list each adapter separately")
        parameters = self._entry_parameters(item, path)
        weight = parameters.pop("weight", 1.0)
        return AdapterEntry(reference, weight, parameters, bool(item.get("base_is_residual")))

    def folded_adapter(self, item: Mapping[str, Any], path: Path) -> AdapterEntry:
        """Build an adapter inside a model. It takes only a weight, because no merge method applies to it."""
        entry = self.adapter(item, path)
        check_values(entry.weight, (*path, "weight"), _FOLD_WEIGHT, self.report)
        if entry.parameters:
            text = "an adapter inside a model takes only a weight"
            self.report((*path, "parameters"), text, "list it under the top-level 'adapters' to use a merge method")
        return entry

    def ref(self, item: Mapping[str, Any], path: Path) -> tuple[ModelRef, tuple[ModelRef, ...]]:
        model, adapters = parse_ref(item.get("path") or "?")
        if item.get("revision"):
            model = ModelRef(model.path, item["revision"])
        if not model.path or not all(adapter.path for adapter in adapters):
            self.report(path, f"'{item.get('path')}' is not a model reference", "write path[@revision][+adapter]")
        return model, adapters


def check_values(value: Any, path: Path, parameter: Parameter, report: ReportProblem) -> None:
    """Report every number or boolean in a value that the parameter does not accept."""
    for scalar in scalars(value):
        if parameter.kind == "float" and isinstance(scalar, bool):
            report(path, f"'{parameter.name}' must be a number, not {str(scalar).lower()}")
        elif parameter.kind == "bool" and not isinstance(scalar, bool) and scalar not in (0, 1):
            report(path, f"'{parameter.name}' must be true or false, not {scalar}")
        elif parameter.within and not isinstance(scalar, bool) and scalar not in parameter.within:
            report(path, f"'{parameter.name}' must be in {parameter.within}, not {scalar}")
        elif scalar != scalar or scalar in (float("inf"), float("-inf")):
            report(path, f"'{parameter.name}' must be a finite number, not {scalar}")


def parse_ref(reference: str) -> tuple[ModelRef, tuple[ModelRef, ...]]:
    """Parse `path[@revision][+adapter[@revision]]...` into the model and its adapters.

    An existing path means that path, whatever characters it contains.
    """
    if _exists(reference):
        return ModelRef(reference), ()
    model, *adapters = (_parse_revision(part.strip()) for part in reference.split("+"))
    return model, tuple(adapters)


def _parse_revision(part: str) -> ModelRef:
    if "@" not in part or _exists(part) or ("://" in part and not part.startswith("hf://")):
        return ModelRef(part)
    path, _, revision = part.partition("@")
    return ModelRef(path, revision or None)


def _exists(path: str) -> bool:
    try:
        return FilePath(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of an unknown user, a NUL
        return False


def build_output(value: Mapping[str, Any]) -> Output:
    """Build the validated `output` part of a recipe."""
    return Output(
        path=value.get("path"),
        safetensors=value.get("safetensors") is not False,
        shard_size=value.get("shard_size") or Output.shard_size,
        gguf=tuple(_gguf(entry) for entry in value.get("gguf") or []),
        gguf_from=value.get("gguf_from") or "float32",
        gguf_pre=value.get("gguf_pre"),
        mmproj=(value.get("mmproj") or "").lower() or None,
        converter=value.get("converter"),
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
