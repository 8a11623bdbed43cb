"""Every input of a recipe, found and opened: headers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergeforge import hub
from mergeforge.recipe import AdapterEntry, ModelEntry, ModelRef, Recipe
from mergeforge.sources.adapter import Adapter, open_adapter
from mergeforge.sources.checkpoint import Checkpoint, open_checkpoint

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

    def model(self, entry: ModelEntry) -> OpenModel:
        checkpoint = self._checkpoint(entry.model)
        return OpenModel(entry, checkpoint, tuple(self.adapter(one, checkpoint) for one in entry.adapters))

    def adapter(self, entry: AdapterEntry, base: Checkpoint) -> OpenAdapter:
        where = hub.fetch(
            entry.adapter.path, entry.adapter.revision, ("adapter_model",), allow_pickle=self.allow_pickle
        )
        label = str(entry.adapter)
        adapter = open_adapter(where.path, label, base, revision=where.revision, allow_pickle=self.allow_pickle)
        return OpenAdapter(entry, adapter)

    def _checkpoint(self, reference: ModelRef) -> Checkpoint:
        where = hub.fetch(reference.path, reference.revision, ("model",), allow_pickle=self.allow_pickle)
        key = (where.path.resolve(), where.revision)
        if key not in self._opened:
            self._opened[key] = open_checkpoint(
                where.path, str(reference), revision=where.revision, allow_pickle=self.allow_pickle
            )
        return self._opened[key]
