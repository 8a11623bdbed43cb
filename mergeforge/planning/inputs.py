"""Every input of a recipe, found and opened: headers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergeforge import hub
from mergeforge.errors import SourceError
from mergeforge.recipe import AdapterEntry, ModelEntry, ModelRef, Recipe
from mergeforge.sources.adapter import Adapter, open_adapter
from mergeforge.sources.checkpoint import Checkpoint, open_checkpoint
from mergeforge.sources.dequantised import open_gguf
from mergeforge.sources.gguf_adapter import open_gguf_adapter

Tell = Callable[[str], None]


@dataclass(frozen=True)
class OpenAdapter:
    entry: AdapterEntry
    adapter: Adapter


@dataclass(frozen=True)
class OpenModel:
    """A model of the recipe with the adapters that are folded into it first."""

    entry: ModelEntry
    checkpoint: Checkpoint
    adapters: tuple[OpenAdapter, ...]

    @property
    def label(self) -> str:
        return str(self.entry)


@dataclass(frozen=True)
class Inputs:
    """base_model, models and adapters of a recipe, in its order."""

    base: OpenModel | None
    models: tuple[OpenModel, ...]
    adapters: tuple[OpenAdapter, ...]

    @property
    def donor(self) -> OpenModel:
        """The model whose config, tokenizer and tensor names the output takes."""
        return self.base or self.models[0]

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every table of tensors that is read, each once."""
        models = [*([self.base] if self.base else []), *self.models]
        found = [model.checkpoint for model in models]
        for opened in [*(one for model in models for one in model.adapters), *self.adapters]:
            found.extend(opened.adapter.files)
        return tuple({id(table): table for table in found}.values())

    @property
    def notes(self) -> tuple[str, ...]:
        models = [*([self.base] if self.base else []), *self.models]
        notes = [note for model in models for note in model.checkpoint.warnings]
        opened = [*(one for model in models for one in model.adapters), *self.adapters]
        notes += [note for one in opened for note in one.adapter.notes]
        return tuple(dict.fromkeys(notes))


def open_inputs(recipe: Recipe, *, allow_pickle: bool = False) -> Inputs:
    """Find, fetch and open everything that a recipe names. Raises SourceError."""
    opener = _Opener(allow_pickle)
    opener.find_plain([*([recipe.base_model] if recipe.base_model else []), *recipe.models])
    base = opener.model(recipe.base_model) if recipe.base_model else None
    models = tuple(opener.model(entry) for entry in recipe.models)
    adapters = tuple(opener.adapter(entry, base.checkpoint) for entry in recipe.adapters) if base else ()
    return Inputs(base, models, adapters)


@dataclass
class _Opener:
    """Opens each model once, however often the recipe names it."""

    allow_pickle: bool

    def __post_init__(self) -> None:
        self._opened: dict[tuple[Path, str | None], Checkpoint] = {}
        self._plain: Checkpoint | None = None

    def find_plain(self, entries: list[ModelEntry]) -> None:
        """The first model that is not a GGUF gives names, shapes and config to those that are."""
        if any(_is_gguf(entry.model) for entry in entries):
            plain = next((entry for entry in entries if not _is_gguf(entry.model)), None)
            if plain is None:
                hint = "name the model's folder as base_model, or as one of the models"
                raise SourceError("a GGUF file has neither config.json nor tokenizer files", hint=hint)
            self._plain = self._checkpoint(plain.model)

    def model(self, entry: ModelEntry) -> OpenModel:
        checkpoint = self._checkpoint(entry.model)
        return OpenModel(entry, checkpoint, tuple(self.adapter(one, checkpoint) for one in entry.adapters))

    def adapter(self, entry: AdapterEntry, base: Checkpoint) -> OpenAdapter:
        where = hub.fetch(
            entry.adapter.path, entry.adapter.revision, ("adapter_model",), allow_pickle=self.allow_pickle
        )
        label = str(entry.adapter)
        if where.path.suffix == ".gguf" and where.path.is_file():
            return OpenAdapter(entry, open_gguf_adapter(where.path, label, base))
        adapter = open_adapter(where.path, label, base, revision=where.revision, allow_pickle=self.allow_pickle)
        return OpenAdapter(entry, adapter)

    def _checkpoint(self, reference: ModelRef) -> Checkpoint:
        where = hub.fetch(reference.path, reference.revision, ("model",), allow_pickle=self.allow_pickle)
        key = (where.path.resolve(), where.revision)
        if key not in self._opened:
            self._opened[key] = self._open(where, str(reference))
        return self._opened[key]

    def _open(self, where: hub.Local, label: str) -> Checkpoint:
        if where.path.suffix == ".gguf" and where.path.is_file():
            assert self._plain is not None
            return open_gguf(where.path, label, self._plain)
        return open_checkpoint(where.path, label, revision=where.revision, allow_pickle=self.allow_pickle)


def _is_gguf(reference: ModelRef) -> bool:
    return reference.path.endswith(".gguf")
