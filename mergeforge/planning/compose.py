"""Recipe and inputs -> the way in which every output tensor comes about.

With adapters alone, each adapter is a task vector on the base and any method applies to these.
With models, an adapter is one more model: the base plus its delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.errors import RecipeError, SourceError, listing
from mergeforge.methods import Method
from mergeforge.planning.inputs import Inputs, OpenAdapter, OpenModel
from mergeforge.recipe import ModelEntry, Recipe
from mergeforge.recipe.settings import layer_positions, value_at
from mergeforge.sources import Way
from mergeforge.sources.adapted import Adapted, AdapterDelta
from mergeforge.sources.adapter import EMBEDDINGS, is_head, tied_head
from mergeforge.sources.checkpoint import Checkpoint
from mergeforge.sources.edits import Edit, Replaced
from mergeforge.sources.merged import Merged
from mergeforge.sources.renamed import Renamed
from mergeforge.sources.stored import Stored, same_content

FOLDS = ("fold", "task_arithmetic")


@dataclass(frozen=True)
class Composition:
    """Every output tensor's way by name, what happens to it in words, and whether it ends up tied."""

    ways: Mapping[str, Way]
    actions: Mapping[str, str]
    tied: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """The ways of one model's tensors, and (head, embedding) while these are one tensor.

    `parted`: the same names, once an adapter has made them two tensors.
    """

    label: str
    ways: Mapping[str, Way]
    tied: tuple[str, str] | None
    parted: tuple[str, str] | None = None

    def way(self, name: str) -> Way | None:
        """A tensor's way; a tied head is its embedding under another name."""
        if name in self.ways:
            return self.ways[name]
        if self.tied and name == self.tied[0]:
            return _renamed(self.ways[self.tied[1]], name)
        return None

    def edits(self, opened: OpenAdapter, name: str) -> tuple[Edit, ...]:
        """An adapter's edits of a tensor; what it does to an embedding for its tied head, too."""
        if self.parted and name == self.parted[0] and opened.adapter.keeps_tied:
            name = self.parted[1]
        return opened.adapter.edits.get(name, ())


def compose(recipe: Recipe, method: Method, inputs: Inputs) -> Composition:
    """The whole merge as ways.

    Raises RecipeError or SourceError when inputs, shapes or parameters do not fit together.
    """
    return _Composer(recipe, method, inputs).composition()


class _Composer:
    def __init__(self, recipe: Recipe, method: Method, inputs: Inputs) -> None:
        self.recipe = recipe
        self.method = method
        self.inputs = inputs
        self.notes: list[str] = []
        self.actions: dict[str, str] = {}

    def composition(self) -> Composition:
        if self.inputs.models:
            ways, tied = self._over_models()
        else:
            ways, tied = self._over_adapters()
        return Composition(ways, self.actions, tied, tuple(self.notes))

    # adapters alone

    def _over_adapters(self) -> tuple[dict[str, Way], bool]:
        assert self.inputs.base is not None
        table = self._table(self.inputs.base, self.inputs.adapters)
        positions = layer_positions(table.ways)
        self._check_count(len(self.inputs.adapters))
        ways: dict[str, Way] = {}
        for name, way in table.ways.items():
            edits = [table.edits(opened, name) for opened in self.inputs.adapters]
            ways[name] = self._adapted(name, way, edits, positions[name]) if any(edits) else way
        _follow_embedding(ways, table.tied, self.inputs.base.checkpoint)
        _check_vocabulary(ways, self.inputs.base.checkpoint)
        return ways, table.tied is not None

    def _adapted(self, name: str, base: Way, edits: Sequence[tuple[Edit, ...]], position: float) -> Way:
        sources = [_Settings({"weight": one.entry.weight, **one.entry.parameters}) for one in self.inputs.adapters]
        parameters = self._parameters(name, position, sources, [one.adapter.label for one in self.inputs.adapters])
        if self.recipe.merge_method in FOLDS:
            return self._folded(name, base, edits, _fold_weights(parameters))
        self._check_rows(name, base, edits)
        self.actions[name] = f"{self.method.name} of {len(edits)} adapters' deltas"
        deltas = tuple(AdapterDelta(base, one) for one in edits)
        return Merged(base.info, self.method, deltas, (False,) * len(deltas), base, parameters, self.recipe.random_seed)

    def _folded(self, name: str, base: Way, edits: Sequence[tuple[Edit, ...]], weights: Sequence[float]) -> Way:
        terms = [(weight, edit) for weight, some in zip(weights, edits, strict=True) for edit in some if weight]
        if not terms:
            return base
        kinds = dict.fromkeys(edit.about for _, edit in terms)
        self.actions[name] = (
            f"base + {len(terms)} x {'/'.join(kinds)}" if len(terms) > 1 else f"base + {terms[0][1].about}"
        )
        if len(terms) == 1 and terms[0][0] == 1 and isinstance(terms[0][1], Replaced):
            self.actions[name] = "replaced by the adapter's"
            return _renamed(terms[0][1].value, name)
        self._check_rows(name, base, edits)
        return Adapted(base, tuple(terms))

    def _check_rows(self, name: str, base: Way, edits: Sequence[tuple[Edit, ...]]) -> None:
        """A replacement with another number of rows has no delta: it cannot be weighted or combined."""
        for edit in (edit for some in edits for edit in some):
            if isinstance(edit, Replaced) and edit.value.info.shape != base.info.shape:
                shapes = f"{list(edit.value.info.shape)}, the base has {list(base.info.shape)}"
                hint = "fold that adapter alone, with weight 1, and merge the others into the result"
                raise SourceError(f"{edit.value.file.path} replaces {name} with shape {shapes}", hint=hint)

    # models, with or without adapters

    def _over_models(self) -> tuple[dict[str, Way], bool]:
        base = self._table(self.inputs.base, self.inputs.adapters) if self.inputs.base else None
        entries, tables = self._inputs(base)
        sources = [_Settings(entry.parameters) for entry in entries]
        labels = [table.label for table in tables]
        for opened in self.inputs.adapters:
            assert base is not None
            sources.append(_Settings({"weight": opened.entry.weight, **opened.entry.parameters}))
            labels.append(opened.adapter.label)
        self._check_count(len(sources))
        every = [*([base] if base else []), *tables]
        names = self._names(every)
        positions = layer_positions(names)
        tied = all(table.tied and table.tied[0] not in names for table in every)
        ways: dict[str, Way] = {}
        for name in names:
            found = [table.way(name) for table in tables]
            origin = base.way(name) if base else None
            edits = [base.edits(opened, name) for opened in self.inputs.adapters] if base else []
            ways[name] = self._merged(name, origin, found, edits, sources, labels, positions[name])
        return ways, tied

    def _inputs(self, base: _Table | None) -> tuple[list[ModelEntry], list[_Table]]:
        """The models that are the method's inputs, in its order."""
        entries = [model.entry for model in self.inputs.models]
        tables = [self._table(model) for model in self.inputs.models]
        if self.inputs.base is None or base is None:
            return entries, tables
        base_entry = self.inputs.base.entry
        listed = next((at for at, entry in enumerate(entries) if str(entry) == self.inputs.base.label), None)
        if listed is not None and (self.method.on_deltas or self.method.base_is_input):
            base_entry, base = entries.pop(listed), tables.pop(listed)
        if self.method.on_deltas:
            return entries, tables
        adapters = len(self.inputs.adapters)
        if self.method.base_is_input and (not adapters or len(entries) + adapters < self.method.inputs[1]):
            return [base_entry, *entries], [base, *tables]
        if listed is None and self._counts_base(len(entries)):
            return [*entries, base_entry], [*tables, base]
        if listed is None:
            self.notes.append("base_model gives names, config and tokenizer; its weights take no part")
        return entries, tables

    def _counts_base(self, others: int) -> bool:
        """Whether an unlisted base is one input more, as in mergekit: if the recipe gives it parameters."""
        required = (one.name for one in self.method.parameters.values() if one.per_input and one.required)
        return others < self.method.inputs[1] and all(name in self.recipe.parameters for name in required)

    def _names(self, tables: Sequence[_Table]) -> list[str]:
        """The output's tensors: those of every input. Raises SourceError for one that some input lacks."""
        names = list(dict.fromkeys(name for table in tables for name in table.ways))
        for table in tables:
            if missing := [name for name in names if table.way(name) is None]:
                holders = {other.label for other in tables for name in missing if other.way(name) is not None}
                text = f"{table.label} lacks {listing(missing)}, which {listing(sorted(holders), 3)} has"
                raise SourceError(text, hint="models can be merged only when they hold the same tensors")
        return names

    def _merged(
        self,
        name: str,
        origin: Way | None,
        found: Sequence[Way | None],
        edits: Sequence[tuple[Edit, ...]],
        sources: Sequence[_Settings],
        labels: Sequence[str],
        position: float,
    ) -> Way:
        models = [way for way in found if way is not None]
        donor = origin or models[0]
        for way, label in zip(models, labels, strict=False):
            if way.info.shape != donor.info.shape:
                shapes = f"{list(way.info.shape)}, not {list(donor.info.shape)} as in {self.inputs.donor.label}"
                hint = "models of one shape only; a vocabulary that was resized shows in the embedding"
                raise SourceError(f"{label}: {name} is {shapes}", hint=hint)
        if not donor.info.is_float:
            self.actions[name] = "copied (not a float)"
            return donor
        parameters = self._parameters(name, position, sources, labels)
        if self.method.on_deltas:
            assert origin is not None
            self._check_rows(name, origin, edits)
            inputs = (*models, *(AdapterDelta(origin, some) for some in edits))
            subtract = (True,) * len(models) + (False,) * len(edits)
            if not inputs:
                return origin
        else:
            adapted = [self._folded(name, origin, [some], [1.0]) for some in edits] if origin else []
            inputs, subtract = (*models, *adapted), (False,) * (len(models) + len(adapted))
        if self.method.name == "passthrough" and parameters["scale"][0] in (None, 1.0):
            self.actions.pop(name, None)
            return inputs[0]
        self.actions[name] = f"{self.method.name} of {len(inputs)}"
        base = origin if self.method.on_deltas else None
        return Merged(donor.info, self.method, inputs, subtract, base, parameters, self.recipe.random_seed)

    # parts of both

    def _check_count(self, count: int) -> None:
        low, high = self.method.inputs
        if not low <= count <= high:
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise RecipeError(f"{self.method.name} takes {wanted} inputs; the recipe gives {count}")

    def _parameters(
        self, name: str, position: float, sources: Sequence[_Settings], labels: Sequence[str]
    ) -> dict[str, Any]:
        """The method's parameters for one tensor: the input's own, else the recipe's, else the default."""
        values: dict[str, Any] = {}
        for parameter in self.method.parameters.values():
            shared = value_at(self.recipe.parameters.get(parameter.name), name, position, kind=parameter.kind)
            own = [
                value_at(source.values.get(parameter.name), name, position, kind=parameter.kind) for source in sources
            ]
            for at, value in enumerate(own if parameter.per_input else [None]):
                value = shared if value is None else value
                if value is None and parameter.required:
                    owner = f" for {labels[at]}" if parameter.per_input else ""
                    hint = f"add 'parameters: {{{parameter.name}: ...}}'; filters need one without a name for the rest"
                    raise RecipeError(f"{self.method.name} needs '{parameter.name}'{owner} at {name}", hint=hint)
                value = parameter.default if value is None else value
                if value is not None:
                    value = bool(value) if parameter.kind == "bool" else float(value)
                values.setdefault(parameter.name, []).append(value)
            if not parameter.per_input:
                values[parameter.name] = values[parameter.name][0]
        try:
            self.method.check_parameters(values)
        except ValueError as error:
            raise RecipeError(f"{self.method.name} at {name}: {error}") from None
        return values

    def _table(self, model: OpenModel, later: Sequence[OpenAdapter] = ()) -> _Table:
        """A model's ways with its own adapters folded in; `later` adapters only settle shapes and ties."""
        opened = (*model.adapters, *later)
        checkpoint = model.checkpoint
        ways: dict[str, Way] = dict(checkpoint.tensors)
        self._place_saved(ways, checkpoint, opened)
        tied = self._settle_tied(ways, checkpoint, opened)
        table = _Table(model.label, ways, tied, None if tied else tied_head(checkpoint))
        positions = layer_positions(ways)
        for name, way in list(ways.items()):
            edits = [table.edits(one, name) for one in model.adapters]
            if any(edits):
                weights = [_weight(one, name, positions[name]) for one in model.adapters]
                ways[name] = self._folded(name, way, edits, weights)
        _follow_embedding(ways, tied, checkpoint)
        if not later:
            _check_vocabulary(ways, checkpoint)
        return table

    def _place_saved(self, ways: dict[str, Way], checkpoint: Checkpoint, opened: Sequence[OpenAdapter]) -> None:
        """Tensors that adapters bring whole: grown embeddings, heads that the base lacks."""
        placed: dict[str, tuple[str, Stored]] = {}
        for one in opened:
            for name, stored in {**one.adapter.resized, **one.adapter.added}.items():
                label, other = placed.setdefault(name, (one.adapter.label, stored))
                if other is not stored and not same_content(other, stored):
                    hint = "fold them one after the other"
                    raise SourceError(f"{label} and {one.adapter.label} both bring their own {name}", hint=hint)
                ways[name] = _renamed(stored, name)
                self.actions[name] = "the adapter's"

    def _settle_tied(
        self, ways: dict[str, Way], checkpoint: Checkpoint, opened: Sequence[OpenAdapter]
    ) -> tuple[str, str] | None:
        """Part head and embedding where an adapter changes one and not the other."""
        tied = tied_head(checkpoint)
        if tied is None:
            return None
        head, embedding = tied
        for one in opened:
            touched = {*one.adapter.edits, *one.adapter.resized} & {head, embedding}
            if touched and not one.adapter.keeps_tied:
                if head not in one.adapter.resized:
                    ways[head] = _renamed(ways[embedding], head)
                note = f"{one.adapter.label} changes {listing(sorted(touched))}, which {checkpoint.label} ties: "
                self.notes.append(note + "both are written, tie_word_embeddings becomes false")
                return None
        return tied


@dataclass(frozen=True)
class _Settings:
    """An input's own parameters."""

    values: Mapping[str, Any]


def _weight(opened: OpenAdapter, name: str, position: float) -> float:
    value = value_at(opened.entry.weight, name, position)
    return 0.0 if value is None else float(value)


def _fold_weights(parameters: Mapping[str, Any]) -> list[float]:
    weights = parameters["weight"]
    divisor = sum(weights) if parameters["normalize"] and abs(sum(weights)) >= 1e-8 else 1.0
    return [weight * parameters["lambda"] / divisor for weight in weights]


def _follow_embedding(ways: dict[str, Way], tied: tuple[str, str] | None, checkpoint: Checkpoint) -> None:
    """A tied head that is stored all the same is written as what the embedding becomes."""
    if tied and tied[0] in ways and ways[tied[1]] is not checkpoint.tensors[tied[1]]:
        ways[tied[0]] = _renamed(ways[tied[1]], tied[0])


def _check_vocabulary(ways: Mapping[str, Way], checkpoint: Checkpoint) -> None:
    """Raises SourceError when adapters leave a head and an embedding with different numbers of rows."""
    heads = [name for name in ways if is_head(name)]
    embeddings = [name for name in ways if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS]
    if len(heads) != 1 or len(embeddings) != 1:
        return
    head, embedding = ways[heads[0]].info, ways[embeddings[0]].info
    before = [checkpoint.tensors[info.name].info.rows for info in (head, embedding) if info.name in checkpoint.tensors]
    if head.rows != embedding.rows and not {head.rows, embedding.rows} <= set(before):
        text = f"{embedding.name} would have {embedding.rows} rows and {head.name} {head.rows}"
        hint = "the adapter's file holds only one of the two that were resized (PEFT saves only a targeted one)"
        raise SourceError(f"{text}: an adapter resized one of them alone", hint=hint)


def _renamed(way: Way, name: str) -> Way:
    """The way's tensor under another name."""
    if way.info.name == name:
        return way
    if isinstance(way, Stored):
        return replace(way, info=way.info.renamed(name))
    return Renamed(way, name)
