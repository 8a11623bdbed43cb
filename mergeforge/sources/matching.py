"""The tensors of a PEFT adapter, matched one by one to the checkpoint that it is folded into.

The file's keys are the truth: every one must find exactly one tensor of the base (or parts of some), with
the right shape, or the adapter is refused. The config decides only what has no trace in the tensors (scales).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.adapters.keys import Key, clean_path, find_tensor, parse_key
from mergeforge.adapters.kinds import Formula, Kind, Module
from mergeforge.adapters.lora import LoraSettings
from mergeforge.adapters.tf5 import Part, loaded_name, loaded_tensors
from mergeforge.errors import SourceError, listing
from mergeforge.sources import Way
from mergeforge.sources.checkpoint import Checkpoint, Model
from mergeforge.sources.edits import Added, Dora, Edit, LowRank, Replaced, RowsReplaced
from mergeforge.sources.expert_matching import Pair, expert_edits, is_expert_module, split_module
from mergeforge.sources.experts import InRows
from mergeforge.sources.formulated import Formulated
from mergeforge.sources.stored import Stored, same_content
from mergeforge.sources.tied import CONV1D_MODELS, EMBEDDINGS, HEADS, is_head, tied_head


@dataclass(frozen=True)
class Adapter:
    """An adapter ready to fold: edits by tensor name.

    `resized` holds tensors that take the base's place before anything else (an embedding saved with
    a grown vocabulary), `added` tensors that the base lacks (a new head). `keeps_tied`: what it does
    to the embedding is meant for the tied lm_head too.
    """

    label: str
    folder: Path
    revision: str | None
    edits: Mapping[str, tuple[Edit, ...]]
    resized: Mapping[str, Stored]
    added: Mapping[str, Stored]
    keeps_tied: bool
    files: tuple[Checkpoint, ...]
    notes: tuple[str, ...]


@dataclass
class Matching:
    """The work of opening one adapter: groups keys by module, then turns modules into edits."""

    label: str
    base: Model
    table: Checkpoint
    settings: LoraSettings
    kind: Kind | None
    config: Mapping[str, Any]
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    resized: dict[str, Stored] = field(default_factory=dict)
    added: dict[str, Stored] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tied = tied_head(self.base)

    def adapter(self, folder: Path, revision: str | None) -> Adapter:
        """Match everything. Raises SourceError for a tensor that has no home."""
        modules = self._modules()
        if not modules:
            raise SourceError(f"{self.label} holds no tensors", hint="was it saved from an unwrapped model?")
        for module, roles in modules.items():
            self._start(module, roles)
        if self.kind:
            self._formulas(self.kind, modules)
        if self.settings.target_parameters:
            self._experts(modules)
        for module, roles in modules.items():
            self._module(module, roles)
        keeps_tied = self._settle_tied()
        trained_on = self.config.get("base_model_name_or_path")
        if trained_on and Path(str(trained_on)).name != Path(self.base.label.split("@")[0]).name:
            self.notes.append(f"{self.label} was trained on {trained_on}, and is folded into {self.base.label}")
        return Adapter(
            self.label,
            folder,
            revision,
            {name: tuple(edits) for name, edits in self.edits.items()},
            self.resized,
            self.added,
            keeps_tied,
            (self.table,),
            (*self.table.warnings, *self.notes),
        )

    def _modules(self) -> dict[str, dict[str, Stored]]:
        modules: dict[str, dict[str, Stored]] = {}
        for name, stored in self.table.tensors.items():
            key = self._key(name)
            if key is None:
                kind = self.kind.name if self.kind else "LoRA"
                raise SourceError(f"{self.label}: the meaning of its tensor {name!r} is unknown", hint=f"is it {kind}?")
            if stored.info.numel == 0:
                hint = "DeepSpeed ZeRO-3 saved it without gathering: save it again with the weights gathered"
                raise SourceError(f"{self.label}: {name!r} is empty (shape {list(stored.info.shape)})", hint=hint)
            if not stored.info.is_float and not (self.kind and stored.info.dtype[0] in "UI"):
                raise SourceError(f"{self.label}: {name!r} has dtype {stored.info.dtype}, not a float")
            roles = modules.setdefault(key.module, {})
            if key.role in roles and not same_content(roles[key.role], stored):
                raise SourceError(f"{self.label}: {name!r} says again what {roles[key.role].info.name!r} says")
            roles[key.role] = stored
        return modules

    def _key(self, name: str) -> Key | None:
        own = self.kind.role_of(clean_path(name)) if self.kind else None
        return Key(*own) if own else parse_key(name)

    def _formulas(self, kind: Kind, modules: dict[str, dict[str, Stored]]) -> None:
        """Turn the kind's own tensors into edits of weights and biases."""
        shared = modules.pop("", {})
        own = {
            module: {role: roles.pop(role) for role in list(roles) if role.startswith(kind.prefixes)}
            for module, roles in modules.items()
        }
        own = {module: factors for module, factors in own.items() if factors}
        weights = {module: self._weight_of(module, factors) for module, factors in own.items()}
        sizes = [(shape[0], math.prod(shape[1:])) for shape in (weight.info.shape for weight in weights.values())]
        largest = (max((out for out, _ in sizes), default=0), max((inside for _, inside in sizes), default=0))
        for module, factors in own.items():
            self._formula(kind, module, {**factors, **shared}, weights[module], largest)

    def _experts(self, modules: dict[str, dict[str, Stored]]) -> None:
        """Turn the factors of fused experts into edits of their stack, or of each expert."""
        wrapped: dict[str, list[Pair]] = {}
        for module in [one for one in modules if is_expert_module(one, self.settings)]:
            own, depth = split_module(module)
            if {"A", "B"} <= modules[module].keys():
                a, b = modules[module].pop("A"), modules[module].pop("B")
                if self._find(f"{own}.weight"):
                    self._low_rank(own, a, b, False, None, None)  # one matrix, such as a router's
                else:
                    wrapped.setdefault(own, []).append(Pair(a, b, depth))
        for own, pairs in wrapped.items():
            try:
                edits = expert_edits(own, pairs, self.settings, self.base, self.loaded)
            except ValueError as error:
                raise SourceError(f"{self.label}: {error}", hint="does it belong to this model?") from None
            for name, edit in edits.items():
                self._add(name, edit)
        if wrapped:
            layout = "the ranks of each expert together" if self.settings.by_expert else "as PEFT's"
            self.notes.append(f"{self.label}: lora_B of its {len(wrapped)} expert modules is read {layout}")

    @cached_property
    def loaded(self) -> Mapping[str, tuple[Part, ...]]:
        """What transformers 5 calls the tensors that the checkpoint calls otherwise."""
        return loaded_tensors(self.base.config, {name: way.info.shape for name, way in self.base.tensors.items()})

    def _parts(self, path: str) -> tuple[Part, ...]:
        """Where a tensor of the loaded model lies, if the checkpoint calls or holds it otherwise."""
        found = find_tensor(path, self.loaded)
        return self.loaded[found[0]] if len(found) == 1 else ()

    def _weight_of(self, module: str, factors: Mapping[str, Stored]) -> Way:
        return self._target(self._name(Key(module, "weight"), next(iter(factors.values()))))

    def _formula(
        self, kind: Kind, module: str, factors: Mapping[str, Stored], weight: Way, largest: tuple[int, int]
    ) -> None:
        shapes = {role: stored.info.shape for role, stored in factors.items()}
        transposed = self.base.config.get("model_type") in CONV1D_MODELS and len(weight.info.shape) == 2
        if transposed and module.rpartition(".")[2] not in (*HEADS, *EMBEDDINGS):
            raise SourceError(
                f"{self.label}: {module} is stored transposed (Conv1D): {kind.name} is not supported there"
            )
        try:
            formulas = kind.formulas(self.config, Module(module, shapes, tuple(weight.info.shape), largest))
        except ValueError as error:
            raise SourceError(f"{self.label}: {error}") from None
        for leaf, formula in formulas.items():
            name = weight.info.name if leaf == "weight" else self._find(f"{module}.{leaf}")
            if not name and leaf == "bias" and "weight" in formulas:
                continue  # a layer without a bias has none to change
            target = weight if leaf == "weight" else self._target(name) if name else None
            if target is None:
                self._refuse_unknown(next(iter(factors.values())), f"{module}.{leaf}")
                return
            self._add(name, Formulated(formula, factors, target, self._inner(formula, target, module)))

    def _inner(self, formula: Formula, target: Way, module: str) -> int:
        """Rows of a Conv1d's tensor for each output."""
        shape = target.info.shape
        if len(shape) != 3:
            return 1
        if formula.needs_base:
            raise SourceError(f"{self.label}: {module} is a Conv1d, on which {formula.about} is not supported")
        return shape[1]

    def _start(self, module: str, roles: dict[str, Stored]) -> None:
        """What training started from, where the adapter brings it: an embedding of another size."""
        original, _ = roles.pop("original_weight", None), roles.pop("original_bias", None)
        if (stored := roles.pop("base_weight", original)) is not None:
            self._resize(module, self._name(Key(module, "weight"), stored), stored)

    def _resize(self, module: str, name: str, stored: Stored) -> None:
        self._check_size(module, stored, self._target(name))
        self.resized[name] = stored

    def _module(self, module: str, roles: dict[str, Stored]) -> None:
        low = self._pair(module, roles, "A", "B") or self._pair(module, roles, "embedding_A", "embedding_B")
        if low:
            self._low_rank(module, *low, roles.pop("magnitude", None), roles.pop("B_bias", None))
        if (tokens := roles.pop("tokens", None)) is not None:
            self._tokens(module, tokens)
        for role, leaf in (("weight", "weight"), ("bias", "bias"), ("base_bias", "bias")):
            if (stored := roles.pop(role, None)) is not None:
                self._replacement(module, leaf, stored)
        if roles:
            role, stored = next(iter(roles.items()))
            raise SourceError(f"{self.label}: {stored.info.name!r} has no partner (its module lacks the other factor)")

    def _pair(self, module: str, roles: dict[str, Stored], a: str, b: str) -> tuple[Stored, Stored, bool] | None:
        if a not in roles or b not in roles:
            return None
        first, second = roles.pop(a), roles.pop(b)
        if len(first.info.shape) != 2 or len(second.info.shape) != 2:
            shapes = f"{list(first.info.shape)} and {list(second.info.shape)}"
            raise SourceError(f"{self.label}: {module}: factors of shapes {shapes} are not those of a linear layer")
        rank, wanted = first.info.shape[0], self.settings.ranks_of(module)
        if second.info.shape[1] != rank:
            raise SourceError(f"{self.label}: {module}: A has rank {rank}, B has rank {second.info.shape[1]}")
        if rank not in wanted:
            hint = "adapter_config.json does not belong to these tensors"
            raise SourceError(
                f"{self.label}: {module}: its tensors have rank {rank}, its config says {wanted[0]}", hint=hint
            )
        return first, second, a == "embedding_A"

    def _low_rank(
        self, module: str, a: Stored, b: Stored, embedding: bool, magnitude: Stored | None, bias: Stored | None
    ) -> None:
        if self._in_parts(module, a, b, plain=magnitude is None and bias is None and not embedding):
            return
        name = self._name(Key(module, "weight"), a)
        target = self._target(name)
        outside = (b.info.shape[0], a.info.shape[1])  # (out, in)
        transposed = embedding or self._is_transposed(target, outside, module)
        shape = outside[::-1] if transposed else outside
        if tuple(target.info.shape) != shape:
            self._refuse_shape(module, shape, target)
        if not target.info.is_float:
            hint = "merge into the 16-bit version of the base"
            raise SourceError(f"{self.label}: {name} of {self.base.label} is {target.info.dtype}: quantised", hint=hint)
        scale = self.settings.scale(module, a.info.shape[0])
        if len(alphas := dict.fromkeys(self.settings.alphas_of(module))) > 1:
            given = listing(f"{alpha:g}" for alpha in alphas)
            self.notes.append(f"{self.label}: alpha_pattern gives {module} the alphas {given}; the first is taken")
        low = LowRank(a, b, True, scale) if transposed else LowRank(b, a, False, scale)
        if magnitude is not None:
            if magnitude.info.numel != (shape[1] if transposed else shape[0]):
                self._refuse_shape(module, shape, magnitude)
            self._add(name, Dora(low, magnitude))
        elif self.settings.dora:
            raise SourceError(f"{self.label}: {module} lacks its lora_magnitude_vector, though use_dora is set")
        else:
            self._add(name, low)
        if bias is not None:
            target_name = self._name(Key(module, "bias"), bias)
            self._check_same_shape(module, bias, self._target(target_name))
            self._add(target_name, Added(bias, scale))

    def _in_parts(self, module: str, a: Stored, b: Stored, *, plain: bool) -> bool:
        """Edit the stored tensors that the module's weight is made of, or is a part of; False where it is one of them.

        A loaded weight may be joined of stored ones, or cut out of one; an expert on its own may lie in a stack.
        """
        path = f"{module}.weight"
        if self._find(path):
            return False
        parts = self._parts(path) or self._in_stack(path)
        if parts and not plain:
            raise SourceError(f"{self.label}: {module} lies in parts, where only plain LoRA can be folded")
        scale = self.settings.scale(module, a.info.shape[0])
        rows = sum(part.rows for part in parts)
        for part in parts:
            stored = self.base.tensors[part.name]
            if (rows, stored.info.columns) != (b.info.shape[0], a.info.shape[1]):
                self._refuse_shape(module, (b.info.shape[0], a.info.shape[1]), stored)
            low = LowRank(_rows_of(b, part.first, part.rows), a, False, scale)
            whole = part.start == 0 and part.rows == stored.info.rows
            self._add(part.name, low if whole else InRows(low, part.start, part.rows))
        return bool(parts)

    def _in_stack(self, path: str) -> tuple[Part, ...]:
        """An expert's weight by its old name, where the checkpoint holds the experts fused."""
        new = loaded_name(self.base.config, path)
        found = find_tensor(new[0], self.base.tensors) if new else []
        if new is None or len(found) != 1 or new[1] is None or len(self.base.tensors[found[0]].info.shape) != 3:
            return ()
        _, rows, _ = self.base.tensors[found[0]].info.shape
        half = rows // 2 if new[0].endswith("gate_up_proj") else rows
        return (Part(found[0], half, start=new[1] * rows + new[2] * half),)

    def _is_transposed(self, target: Way, outside: tuple[int, int], module: str) -> bool:
        """Whether W is stored (in, out): told by its shape; a square W by the config or the model."""
        shape = tuple(target.info.shape)
        if outside[0] != outside[1]:
            return shape == outside[::-1] and shape != outside
        in_conv1d = self.base.config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] not in HEADS
        return self.settings.fan_in_fan_out or in_conv1d

    def _tokens(self, module: str, stored: Stored) -> None:
        name = self._name(Key(module, "weight"), stored)
        target = self._target(name)
        indices = self.settings.token_indices
        if isinstance(indices, Mapping):
            indices = next((value for key, value in indices.items() if module.endswith(key)), None)
        if not isinstance(indices, list) or len(indices) != stored.info.rows:
            raise SourceError(
                f"{self.label}: {module} has {stored.info.rows} trained tokens; its config does not name them"
            )
        if stored.info.columns != target.info.columns or max(indices) >= target.info.rows or min(indices) < 0:
            self._refuse_shape(module, stored.info.shape, target)
        self._add(name, RowsReplaced(tuple(indices), stored))

    def _replacement(self, module: str, leaf: str, stored: Stored) -> None:
        saved = self.settings.saves(module)
        found = self._find(f"{module}.{leaf}")
        if not found:
            if not saved:
                self._refuse_unknown(stored, f"{module}.{leaf}")
            self.added[f"{module}.{leaf}"] = stored.__class__(
                stored.info.renamed(f"{module}.{leaf}"), stored.file, stored.offset
            )
            self.notes.append(f"{self.label} adds {module}.{leaf}, which the base lacks: check the config's head")
        elif leaf == "weight" and not saved and module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS):
            self._resize(module, found, stored)  # saved beside a grown vocabulary, not trained as a module
        else:
            self._check_size(module, stored, self._target(found))
            self._add(found, Replaced(stored))

    def _add(self, name: str, edit: Edit) -> None:
        self.edits.setdefault(name, []).append(edit)

    def _name(self, key: Key, stored: Stored) -> str:
        found = self._find(f"{key.module}.{key.role}")
        if not found:
            self._refuse_unknown(stored, f"{key.module}.{key.role}")
        return found

    def _find(self, path: str) -> str:
        """The base's tensor for an adapter's path; "" for none."""
        found = find_tensor(path, self.base.tensors)
        if not found and self.tied and is_head(path):
            return self.tied[0]
        if not found and len(parts := self._parts(path)) == 1 and self._is_whole(parts[0]):
            return parts[0].name
        if len(found) > 1:
            raise SourceError(f"{self.label}: {path} may mean any of {listing(found)} of {self.base.label}")
        return found[0] if found else ""

    def _is_whole(self, part: Part) -> bool:
        return part.expert is None and part.start == 0 and part.rows == self.base.tensors[part.name].info.shape[0]

    def _target(self, name: str) -> Way:
        """The tensor that is edited: the base's, or what the adapter saved in its place."""
        if name in self.resized:
            return self.resized[name]
        if name in self.base.tensors:
            return self.base.tensors[name]
        assert self.tied is not None and name == self.tied[0]
        return self.resized.get(self.tied[1], self.base.tensors[self.tied[1]])

    def _check_size(self, module: str, stored: Stored, target: Way) -> None:
        """The shape of the base's tensor, but for the rows of a vocabulary."""
        may_grow = module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
        shape = (target.info.shape[0], *stored.info.shape[1:]) if may_grow else stored.info.shape
        if tuple(shape) != tuple(target.info.shape):
            self._refuse_shape(module, stored.info.shape, target)

    def _check_same_shape(self, module: str, stored: Stored, target: Way) -> None:
        if stored.info.shape != target.info.shape:
            self._refuse_shape(module, stored.info.shape, target)

    def _refuse_shape(self, module: str, shape: tuple[int, ...], target: Way) -> None:
        theirs = f"{target.info.name} of {self.base.label} is {list(target.info.shape)}"
        hint = "the adapter was trained on another model, or its vocabulary was resized and not saved"
        raise SourceError(f"{self.label}: {module} is made for shape {list(shape)}, and {theirs}", hint=hint)

    def _refuse_unknown(self, stored: Stored, path: str) -> None:
        near = get_close_matches(path, list(self.base.tensors), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "the adapter belongs to another model"
        raise SourceError(f"{self.label}: {stored.info.name!r} matches no tensor of {self.base.label}", hint=hint)

    def _settle_tied(self) -> bool:
        """Whether head and embedding stay one tensor; drops the head's copy of the same change."""
        if self.tied is None:
            return False
        head, embedding = self.tied
        wholes = self._whole(head), self._whole(embedding)
        if wholes[0] and wholes[1] and same_content(wholes[0], wholes[1]):
            self.edits.pop(head, None)
            self.resized.pop(head, None)
            return True
        both = {head, embedding} <= self.resized.keys()
        if both and same_content(self.resized[head], self.resized[embedding]):
            del self.resized[head]
        edits, head_edits = self.edits.get(embedding, []), self.edits.get(head, [])
        if head in self.resized or not (edits or head_edits):
            return head not in self.resized
        if not head_edits:  # PEFT gives the trained tokens to a tied head too, and nothing else
            return all(isinstance(edit, RowsReplaced) for edit in edits)
        if len(edits) != 1 or len(head_edits) != 1 or not _same_change(edits[0], head_edits[0]):
            return False
        del self.edits[head]
        self.notes.append(f"{self.label}: its change of {head} is that of the tied {embedding}: made once, stays tied")
        return True

    def _whole(self, name: str) -> Stored | None:
        """The tensor that the adapter brings in place of the base's, if it does nothing else to it."""
        edits = self.edits.get(name, [])
        replaced = [edit.value for edit in edits if isinstance(edit, Replaced)]
        return (replaced[0] if len(edits) == len(replaced) == 1 else None) if edits else self.resized.get(name)


def _rows_of(stored: Stored, first: int, rows: int) -> Stored:
    """Rows [first, first + rows) of a matrix as a tensor of their own."""
    info = replace(stored.info, shape=(rows, *stored.info.shape[1:]))
    return Stored(info, stored.file, stored.offset + first * stored.info.row_nbytes)


def _same_change(one: Edit, other: Edit) -> bool:
    """Whether an embedding and its head are changed alike (ensure_weight_tying saves both)."""
    if isinstance(one, RowsReplaced) and isinstance(other, RowsReplaced):
        return one.indices == other.indices and same_content(one.value, other.value)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        factors = zip(one.plain_factors(), other.plain_factors(), strict=True)
        return one.scale == other.scale and all(mine.equal(theirs) for mine, theirs in factors)
    return False
