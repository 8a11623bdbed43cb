"""Inputs: every model and adapter that a recipe names, opened; headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.adapters.gguf_lora import open_gguf_adapter
from mergeforge.adapters.open import Adapter, open_adapter
from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_json
from mergeforge.checkpoints.gguf_checkpoint import open_gguf
from mergeforge.checkpoints.gguf_model import open_gguf_model
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import SourceError
from mergeforge.hub import download
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.remote import RemoteSession
from mergeforge.planner.aligned_names import aligned
from mergeforge.recipe import AdapterEntry, ModelEntry, ModelRef, Recipe
from mergeforge.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter of the recipe, opened."""

    entry: AdapterEntry
    adapter: Adapter


@dataclass(frozen=True)
class OpenModel:
    """A model of the recipe, opened, with the adapters that are folded into it first."""

    entry: ModelEntry
    checkpoint: ModelSource
    adapters: tuple[OpenAdapter, ...]

    @property
    def label(self) -> str:
        return str(self.entry)


@dataclass(frozen=True)
class IntermediateModel:
    """The result of an earlier document of the recipe: a model that is not stored anywhere."""

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
    """The base model, every other model, and the adapters of a recipe, in its order."""

    base: OpenModel | None
    models: tuple[OpenModel, ...]
    adapters: tuple[OpenAdapter, ...]

    @property
    def reference_model(self) -> OpenModel:
        """The model that the output takes its config, tokenizer and tensor names from."""
        return self.base or self.models[0]

    @property
    def all_models(self) -> tuple[OpenModel, ...]:
        """The base model and the others."""
        return (*([self.base] if self.base else []), *self.models)

    @cached_property
    def stored_models(self) -> tuple[OpenModel, ...]:
        """The models that are stored in files, those behind intermediate models included."""
        return tuple(_stored_models(self))

    @cached_property
    def opened_adapters(self) -> tuple[OpenAdapter, ...]:
        """Every adapter, wherever it is folded in."""
        intermediates = (model.checkpoint for model in self.all_models)
        earlier = [model.inputs for model in intermediates if isinstance(model, IntermediateModel)]
        inner = [opened for inputs in earlier for opened in inputs.opened_adapters]
        return (*inner, *(opened for model in self.all_models for opened in model.adapters), *self.adapters)

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint that is read, each once; an adapter's files count as one."""
        checkpoints = [model.checkpoint for model in self.stored_models if isinstance(model.checkpoint, Checkpoint)]
        for opened in self.opened_adapters:
            checkpoints.extend(opened.adapter.checkpoints)
        return tuple({id(checkpoint): checkpoint for checkpoint in checkpoints}.values())

    @property
    def streamed(self) -> bool:
        """Whether any checkpoint is remote and read in ranges."""
        return any(checkpoint.is_remote for checkpoint in self.checkpoints)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [note for model in self.all_models for note in model.checkpoint.warnings]
        notes += [note for opened in self.opened_adapters for note in opened.adapter.notes]
        return tuple(dict.fromkeys(notes))


def _stored_models(inputs: Inputs) -> Iterator[OpenModel]:
    for model in inputs.all_models:
        if isinstance(model.checkpoint, IntermediateModel):
            yield from _stored_models(model.checkpoint.inputs)
        else:
            yield model


ADAPTER_STEMS = ("adapter_model", "adapters", "pytorch_lora_weights")  # file names of PEFT, MLX and diffusers
Replicate = Callable[[OpenModel, Any], OpenModel]  # a model with its layers repeated, as an adapter's config says


class Opener:
    """Finds and opens models and adapters, each once, however often recipes name them.

    intermediate_models: results of earlier documents, by their names. replicate: what an adapter's layer_replication
    asks for. session: how remote inputs are read; stream: read every Hub repo that way, without downloading it.
    """

    def __init__(
        self,
        replicate: Replicate,
        *,
        allow_pickle: bool = False,
        session: RemoteSession | None = None,
        stream: bool = False,
    ) -> None:
        self.replicate = replicate
        self.allow_pickle = allow_pickle
        self.session = session
        self.stream = stream
        self.intermediate_models: dict[str, IntermediateModel] = {}
        self._locations: dict[tuple[ModelRef, tuple[str, ...]], download.LocalInput] = {}
        self._opened: dict[tuple[Path, str | None], Checkpoint] = {}
        self._gguf_companion: Checkpoint | None = None

    def open(self, recipe: Recipe) -> Inputs:
        """Everything that a recipe names. Raises SourceError."""
        self._find_gguf_companion([*([recipe.base_model] if recipe.base_model else []), *recipe.named_models])
        base = self._model(recipe.base_model, recipe.adapters) if recipe.base_model else None
        models: list[OpenModel] = []
        for entry in recipe.named_models:
            reference = base or next(iter(models), None)
            models.append(self._model(entry, names_of=reference.checkpoint if reference else None))
        adapters = tuple(self._adapter(entry, base.checkpoint) for entry in recipe.adapters) if base else ()
        return Inputs(base, tuple(models), adapters)

    def _find_gguf_companion(self, entries: list[ModelEntry]) -> None:
        """Names, shapes and config of GGUF inputs come from the first model that is not a GGUF file, if any."""
        if any(_is_gguf(entry.model) for entry in entries):
            stored = (entry for entry in entries if entry.model.path not in self.intermediate_models)
            companion = next((entry for entry in stored if not _is_gguf(entry.model)), None)
            self._gguf_companion = self._checkpoint(companion.model) if companion else None

    def _model(
        self, entry: ModelEntry, later: Sequence[AdapterEntry] = (), names_of: ModelSource | None = None
    ) -> OpenModel:
        """A model with its adapters, its tensors named as those of `names_of`.

        The caller opens `later` adapters, which may repeat its layers too.
        """
        checkpoint = self._named(entry.model)
        model = OpenModel(entry, aligned(checkpoint, names_of) if names_of else checkpoint, ())
        if ranges := self._replication((*entry.adapters, *later)):
            model = self.replicate(model, ranges)
        return replace(model, adapters=tuple(self._adapter(adapter, model.checkpoint) for adapter in entry.adapters))

    def _replication(self, entries: Sequence[AdapterEntry]) -> Any:
        """The layer_replication that all adapters of one model share. Raises SourceError where they differ."""
        replications = [self.adapter_config(entry).get("layer_replication") or None for entry in entries]
        for entry, replication in zip(entries, replications, strict=True):
            if replication != replications[0]:
                text = f"{entry.adapter} and {entries[0].adapter} were trained with different layer_replication"
                raise SourceError(text, hint="merge each into its own model first")
        return replications[0] if replications else None

    def find_model(self, reference: ModelRef) -> None:
        """Find a model's files, and download them if need be. Raises SourceError."""
        self._location(reference, ("model",))

    def adapter_config(self, entry: AdapterEntry) -> dict[str, Any]:
        """The adapter_config.json of an adapter; empty if it has none. Raises SourceError."""
        path = self._location(entry.adapter, ADAPTER_STEMS).path
        config = (path.parent if path.is_file() else path) / "adapter_config.json"
        return read_json(config) if config.is_file() else {}

    def _location(self, reference: ModelRef, stems: tuple[str, ...]) -> download.LocalInput:
        """Where an input is, looked up once: it does not matter if a branch moves meanwhile."""
        if (reference, stems) not in self._locations:
            self._locations[reference, stems] = download.fetch(
                reference.path,
                reference.revision,
                stems,
                allow_pickle=self.allow_pickle,
                session=self.session,
                stream=self.stream,
            )
        return self._locations[reference, stems]

    def _named(self, reference: ModelRef) -> ModelSource:
        if reference.path in self.intermediate_models and not reference.revision:
            return self.intermediate_models[reference.path]
        return self._checkpoint(reference)

    def _adapter(self, entry: AdapterEntry, base: ModelSource) -> OpenAdapter:
        location = self._location(entry.adapter, ADAPTER_STEMS)
        label = str(entry.adapter)
        if location.path.suffix == ".gguf" and location.path.is_file():
            return OpenAdapter(entry, open_gguf_adapter(location.path, label, base))
        adapter = open_adapter(
            location.path,
            label,
            base,
            revision=location.revision,
            allow_pickle=self.allow_pickle,
            base_is_residual=entry.base_is_residual,
            base_is_stacked=True,  # _model has repeated the layers already
            files=location.files,
        )
        return OpenAdapter(entry, adapter)

    def _checkpoint(self, reference: ModelRef) -> Checkpoint:
        location = self._location(reference, ("model",))
        key = (location.path.resolve(), location.revision)
        if key not in self._opened:
            self._opened[key] = self._open(location, str(reference))
        return self._opened[key]

    def _open(self, location: download.LocalInput, label: str) -> Checkpoint:
        if location.path.suffix == ".gguf" and location.path.is_file():
            if self._gguf_companion is None:
                return open_gguf_model(location.path, label)
            return open_gguf(location.path, label, self._gguf_companion)
        return open_checkpoint(
            location.path, label, revision=location.revision, allow_pickle=self.allow_pickle, files=location.files
        )


def _is_gguf(reference: ModelRef) -> bool:
    return reference.path.endswith(".gguf")
