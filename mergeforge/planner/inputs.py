"""Every input of a recipe, found and opened: headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.adapters.gguf_lora import open_gguf_adapter
from mergeforge.adapters.open import Adapter, open_adapter
from mergeforge.checkpoints.checkpoint import Checkpoint, ModelSource, open_checkpoint, read_json
from mergeforge.checkpoints.gguf_checkpoint import open_gguf
from mergeforge.errors import SourceError
from mergeforge.hub import download
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.remote import RemoteSession
from mergeforge.recipe import AdapterEntry, ModelEntry, ModelRef, Recipe
from mergeforge.tensors.lazy import LazyTensor

Tell = Callable[[str], None]


@dataclass(frozen=True)
class OpenAdapter:
    entry: AdapterEntry
    adapter: Adapter


@dataclass(frozen=True)
class OpenModel:
    """A model of the recipe with the adapters that are folded into it first."""

    entry: ModelEntry
    checkpoint: ModelSource
    adapters: tuple[OpenAdapter, ...]

    @property
    def label(self) -> str:
        return str(self.entry)


@dataclass(frozen=True)
class IntermediateModel:
    """What an earlier document of the recipe makes: a model that lies nowhere."""

    label: str
    inputs: Inputs
    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    files: AuxFiles
    warnings: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.inputs.reference_model.checkpoint.folder


@dataclass(frozen=True)
class Inputs:
    """base_model, every other model, and the adapters of a recipe, in its order."""

    base: OpenModel | None
    models: tuple[OpenModel, ...]
    adapters: tuple[OpenAdapter, ...]

    @property
    def reference_model(self) -> OpenModel:
        """The model whose config, tokenizer and tensor names the output takes."""
        return self.base or self.models[0]

    @property
    def all_models(self) -> tuple[OpenModel, ...]:
        """The base model first."""
        return (*([self.base] if self.base else []), *self.models)

    @cached_property
    def stored_models(self) -> tuple[OpenModel, ...]:
        """The models that lie in files, those behind earlier results too."""
        return tuple(_stored(self))

    @cached_property
    def opened_adapters(self) -> tuple[OpenAdapter, ...]:
        """Every adapter, wherever it is folded in."""
        results = [
            model.checkpoint.inputs for model in self.all_models if isinstance(model.checkpoint, IntermediateModel)
        ]
        inner = [one for inputs in results for one in inputs.opened_adapters]
        return (*inner, *(one for model in self.all_models for one in model.adapters), *self.adapters)

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every table of tensors that is read, each once."""
        found = [model.checkpoint for model in self.stored_models if isinstance(model.checkpoint, Checkpoint)]
        for opened in self.opened_adapters:
            found.extend(opened.adapter.files)
        return tuple({id(table): table for table in found}.values())

    @property
    def streamed(self) -> bool:
        """Whether any of it lies elsewhere and is read in pieces."""
        return any(table.lies_elsewhere for table in self.checkpoints)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [note for model in self.all_models for note in model.checkpoint.warnings]
        notes += [note for one in self.opened_adapters for note in one.adapter.notes]
        return tuple(dict.fromkeys(notes))


def _stored(inputs: Inputs) -> Iterator[OpenModel]:
    for model in inputs.all_models:
        if isinstance(model.checkpoint, IntermediateModel):
            yield from _stored(model.checkpoint.inputs)
        else:
            yield model


ADAPTER_STEMS = ("adapter_model", "adapters", "pytorch_lora_weights")  # PEFT's, MLX's and diffusers' names
Replicate = Callable[[OpenModel, Any], OpenModel]  # a model with its layers repeated, as an adapter says


class Opener:
    """Finds and opens models and adapters, each once, however often recipes name them.

    `results`: what earlier documents make, by their names. `replicate`: what layer_replication asks for.
    `link`: how inputs that lie elsewhere are read; `stream`: so are all Hub repos.
    """

    def __init__(
        self,
        replicate: Replicate,
        *,
        allow_pickle: bool = False,
        link: RemoteSession | None = None,
        stream: bool = False,
    ) -> None:
        self.replicate = replicate
        self.allow_pickle = allow_pickle
        self.link = link
        self.stream = stream
        self.intermediate_models: dict[str, IntermediateModel] = {}
        self._places: dict[tuple[ModelRef, tuple[str, ...]], download.Local] = {}
        self._opened: dict[tuple[Path, str | None], Checkpoint] = {}
        self._plain: Checkpoint | None = None

    def open(self, recipe: Recipe) -> Inputs:
        """Everything that a recipe names. Raises SourceError."""
        self._find_plain([*([recipe.base_model] if recipe.base_model else []), *recipe.entries])
        base = self._model(recipe.base_model, recipe.adapters) if recipe.base_model else None
        models = [self._model(entry) for entry in recipe.entries]
        adapters = tuple(self._adapter(entry, base.checkpoint) for entry in recipe.adapters) if base else ()
        return Inputs(base, tuple(models), adapters)

    def _find_plain(self, entries: list[ModelEntry]) -> None:
        """The first model that is not a GGUF gives names, shapes and config to those that are."""
        if any(_is_gguf(entry.model) for entry in entries):
            stored = (entry for entry in entries if entry.model.path not in self.intermediate_models)
            plain = next((entry for entry in stored if not _is_gguf(entry.model)), None)
            if plain is None:
                hint = "name the model's folder as base_model, or as one of the models"
                raise SourceError("a GGUF file has neither config.json nor tokenizer files", hint=hint)
            self._plain = self._checkpoint(plain.model)

    def _model(self, entry: ModelEntry, later: Sequence[AdapterEntry] = ()) -> OpenModel:
        """A model with its adapters; `later` ones are opened by the caller, and may repeat its layers too."""
        model = OpenModel(entry, self._named(entry.model), ())
        if ranges := self._replication((*entry.adapters, *later)):
            model = self.replicate(model, ranges)
        return replace(model, adapters=tuple(self._adapter(one, model.checkpoint) for one in entry.adapters))

    def _replication(self, entries: Sequence[AdapterEntry]) -> Any:
        """What adapters of one model say of repeated layers: all the same, or nothing. Raises SourceError."""
        told = [self._config(entry).get("layer_replication") or None for entry in entries]
        if any(one != told[0] for one in told):
            odd = next(entry for entry, one in zip(entries, told, strict=True) if one != told[0])
            text = f"{odd.adapter} and {entries[0].adapter} were trained on differently repeated layers"
            raise SourceError(text, hint="merge each into its own model first")
        return told[0] if told else None

    def _config(self, entry: AdapterEntry) -> dict[str, Any]:
        found = self._found(entry).path
        path = (found.parent if found.is_file() else found) / "adapter_config.json"
        return read_json(path) if path.is_file() else {}

    def _found(self, entry: AdapterEntry) -> download.Local:
        return self._place(entry.adapter, ADAPTER_STEMS)

    def _place(self, reference: ModelRef, stems: tuple[str, ...]) -> download.Local:
        """Where an input lies, found once: a branch that moves meanwhile does not matter."""
        if (reference, stems) not in self._places:
            self._places[reference, stems] = download.fetch(
                reference.path,
                reference.revision,
                stems,
                allow_pickle=self.allow_pickle,
                link=self.link,
                stream=self.stream,
            )
        return self._places[reference, stems]

    def _named(self, reference: ModelRef) -> ModelSource:
        if reference.path in self.intermediate_models and not reference.revision:
            return self.intermediate_models[reference.path]
        return self._checkpoint(reference)

    def _adapter(self, entry: AdapterEntry, base: ModelSource) -> OpenAdapter:
        where = self._found(entry)
        label = str(entry.adapter)
        if where.path.suffix == ".gguf" and where.path.is_file():
            return OpenAdapter(entry, open_gguf_adapter(where.path, label, base))
        adapter = open_adapter(
            where.path,
            label,
            base,
            revision=where.revision,
            allow_pickle=self.allow_pickle,
            residual=entry.base_is_residual,
            stacked=True,  # _model has repeated the layers that its layer_replication says
            files=where.files,
        )
        return OpenAdapter(entry, adapter)

    def _checkpoint(self, reference: ModelRef) -> Checkpoint:
        where = self._place(reference, ("model",))
        key = (where.path.resolve(), where.revision)
        if key not in self._opened:
            self._opened[key] = self._open(where, str(reference))
        return self._opened[key]

    def _open(self, where: download.Local, label: str) -> Checkpoint:
        if where.path.suffix == ".gguf" and where.path.is_file():
            assert self._plain is not None
            return open_gguf(where.path, label, self._plain)
        return open_checkpoint(
            where.path, label, revision=where.revision, allow_pickle=self.allow_pickle, files=where.files
        )


def _is_gguf(reference: ModelRef) -> bool:
    return reference.path.endswith(".gguf")
