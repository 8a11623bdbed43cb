"""The tensors of a PEFT adapter, matched one by one to the checkpoint that it is folded into.

The file's keys are the truth: every one must find exactly one tensor of the base (or parts of some), with
the right shape, or the adapter is refused. The config decides only what has no trace in the tensors (scales).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.deltas import AddTensor, LoraDelta, ReplaceRows, ReplaceTensor, WeightDelta
from mergeforge.adapters.lora import Pair, check_rank, low_rank_edits, take_pair
from mergeforge.adapters.match_experts import Pair as ExpertPair
from mergeforge.adapters.match_experts import expert_edits, is_expert_module, split_module
from mergeforge.adapters.peft.keys import UNUSED, Key, clean_path, parse_key
from mergeforge.adapters.peft.kind import Kind, Module
from mergeforge.adapters.peft.lora_config import LoraSettings, told_start
from mergeforge.adapters.peft_delta import PeftDelta
from mergeforge.adapters.resized_embedding import ResizedEmbedding, same_rows
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.checkpoint import Checkpoint, ModelSource
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS
from mergeforge.errors import SourceError, listing
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content


@dataclass(frozen=True)
class Adapter:
    """An adapter ready to fold: edits by tensor name.

    `resized` holds tensors that take the base's place before anything else (an embedding saved with
    a grown vocabulary), `added` tensors that the base lacks (a new head). `keeps_tied`: what it does
    to the embedding is meant for the tied lm_head too. `parameters`: tensors that it changes as parameters of
    modules that are not linear (fused experts, routers): bitsandbytes leaves these in 16 bit.
    """

    label: str
    folder: Path
    revision: str | None
    edits: Mapping[str, tuple[WeightDelta, ...]]
    resized: Mapping[str, LazyTensor]
    added: Mapping[str, StoredTensor]
    keeps_tied: bool
    files: tuple[Checkpoint, ...]
    notes: tuple[str, ...]
    parameters: frozenset[str] = frozenset()


@dataclass
class Matching:
    """The work of opening one adapter: groups keys by module, then turns modules into edits."""

    label: str
    base: ModelSource
    table: Checkpoint
    settings: LoraSettings
    kind: Kind | None
    config: Mapping[str, Any]
    edits: dict[str, list[WeightDelta]] = field(default_factory=dict)
    resized: dict[str, LazyTensor] = field(default_factory=dict)
    added: dict[str, StoredTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.homes = TensorResolver(self.label, self.base, self.resized)
        self.tied = self.homes.tied

    def adapter(self, folder: Path, revision: str | None) -> Adapter:
        """Match everything. Raises SourceError for tensors that have no home, or another shape than theirs."""
        modules = self._modules()
        if not modules:
            raise SourceError(f"{self.label} holds no tensors", hint="was it saved from an unwrapped model?")
        for module, roles in modules.items():
            with self.homes.gathering():
                self._start(module, roles)
        if self.kind:
            self._formulas(self.kind, modules)
        if self.settings.target_parameters:
            self._experts(modules)
        for module, roles in modules.items():
            with self.homes.gathering():
                self._module(module, roles)
        self.homes.check()
        keeps_tied = self._settle_tied()
        if self.kind is None and (told := told_start(self.config, self.settings)):
            self.notes.append(f"{self.label}: {told}")
        self._note_base()
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
            frozenset(self.parameters),
        )

    def _note_base(self) -> None:
        """Say so where the adapter records another base, or another revision of it."""
        trained_on, commit = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if trained_on and Path(str(trained_on)).name != Path(self.base.label.split("@")[0]).name:
            self.notes.append(f"{self.label} was trained on {trained_on}, and is folded into {self.base.label}")
        ours = [getattr(self.base, "revision", None), self.base.label.partition("@")[2]]
        if commit and any(ours) and not any(one and one.startswith(str(commit)) for one in ours):
            theirs = f"revision {commit} of {trained_on or 'its base'}"
            self.notes.append(f"{self.label} was trained on {theirs}, and is folded into {ours[0] or ours[1]}")

    def _modules(self) -> dict[str, dict[str, StoredTensor]]:
        modules: dict[str, dict[str, StoredTensor]] = {}
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
            if key.role == UNUSED:
                continue
            roles = modules.setdefault(key.module, {})
            if key.role in roles and not same_content(roles[key.role], stored):
                raise SourceError(f"{self.label}: {name!r} says again what {roles[key.role].info.name!r} says")
            roles[key.role] = stored
        return modules

    def _key(self, name: str) -> Key | None:
        own = self.kind.role_of(clean_path(name)) if self.kind else None
        return Key(*own) if own else parse_key(name)

    def _formulas(self, kind: Kind, modules: dict[str, dict[str, StoredTensor]]) -> None:
        """Turn the kind's own tensors into edits of weights and biases."""
        shared = modules.pop("", {})
        own = {
            module: {role: roles.pop(role) for role in list(roles) if role.startswith(kind.prefixes)}
            for module, roles in modules.items()
        }
        own = {module: factors for module, factors in own.items() if factors}
        weights: dict[str, LazyTensor] = {}
        for module, factors in own.items():
            with self.homes.gathering():
                weights[module] = self.homes.target(self.homes.name(f"{module}.weight", next(iter(factors.values()))))
        sizes = [(shape[0], math.prod(shape[1:])) for shape in (weight.info.shape for weight in weights.values())]
        largest = (max((out for out, _ in sizes), default=0), max((inside for _, inside in sizes), default=0))
        for module, weight in weights.items():
            with self.homes.gathering():
                self._formula(kind, module, {**own[module], **shared}, weight, largest)

    def _experts(self, modules: dict[str, dict[str, StoredTensor]]) -> None:
        """Turn the factors of fused experts into edits of their stack, or of each expert."""
        wrapped: dict[str, list[ExpertPair]] = {}
        for module in [one for one in modules if is_expert_module(one, self.settings, self.base, self.homes.loaded)]:
            own, depth = split_module(module)
            if {"A", "B"} <= modules[module].keys():
                a, b = modules[module].pop("A"), modules[module].pop("B")
                if name := self.homes.find(f"{own}.weight"):
                    self.parameters.add(name)
                    self._low_rank(Pair(own, a, b))  # one matrix, such as a router's
                else:
                    wrapped.setdefault(own, []).append(ExpertPair(a, b, depth))
        for own, pairs in wrapped.items():
            try:
                edits = expert_edits(own, pairs, self.settings, self.base, self.homes.loaded)
            except ValueError as error:
                raise SourceError(f"{self.label}: {error}", hint="does it belong to this model?") from None
            for name, edit in edits.items():
                self.parameters.add(name)
                self._add(name, edit)
        if wrapped:
            layout = "the ranks of each expert together" if self.settings.by_expert else "as PEFT's"
            self.notes.append(f"{self.label}: lora_B of its {len(wrapped)} expert modules is read {layout}")

    def _formula(
        self, kind: Kind, module: str, factors: Mapping[str, StoredTensor], weight: LazyTensor, largest: tuple[int, int]
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
        except (KeyError, TypeError, ZeroDivisionError) as error:
            text = f"{self.label}: {module}: adapter_config.json lacks a value, or has one that makes no sense"
            raise SourceError(f"{text} ({type(error).__name__}: {error})") from None
        for leaf, formula in formulas.items():
            name = weight.info.name if leaf == "weight" else self.homes.find(f"{module}.{leaf}")
            if not name and leaf == "bias" and "weight" in formulas:
                continue  # a layer without a bias has none to change
            if not name:
                self.homes.refuse_unknown(next(iter(factors.values())), f"{module}.{leaf}")
            target = weight if leaf == "weight" else self.homes.target(name)
            inner = target.info.shape[1] if len(target.info.shape) == 3 else 1  # a Conv1d's rows for each output
            self._add(name, PeftDelta(formula, factors, target, inner))

    def _start(self, module: str, roles: dict[str, StoredTensor]) -> None:
        """What training started from, where the adapter brings it: an embedding of another size."""
        original, _ = roles.pop("original_weight", None), roles.pop("original_bias", None)
        if (stored := roles.pop("base_weight", original)) is not None:
            self._resize(module, self.homes.name(f"{module}.weight", stored), stored)

    def _resize(self, module: str, name: str, stored: StoredTensor) -> None:
        self.homes.check_size(module, stored, self.homes.target(name))
        self.resized[name] = stored

    def _module(self, module: str, roles: dict[str, StoredTensor]) -> None:
        if pair := take_pair(module, roles):
            check_rank(pair, self.settings, self.label)
            self._low_rank(pair)
        if (tokens := roles.pop("tokens", None)) is not None:
            self._tokens(module, tokens)
        for role, leaf in (("weight", "weight"), ("bias", "bias"), ("base_bias", "bias")):
            if (stored := roles.pop(role, None)) is not None:
                self._replacement(module, leaf, stored)
        for role, leaf in (("added", "weight"), ("added_bias", "bias")):
            if (stored := roles.pop(role, None)) is not None:
                self._addition(module, leaf, stored)
        if roles:
            _, stored = next(iter(roles.items()))
            raise SourceError(f"{self.label}: {stored.info.name!r} has no partner (its module lacks the other factor)")

    def _low_rank(self, pair: Pair) -> None:
        edits, notes = low_rank_edits(pair, self.settings, self.homes)
        self.notes += notes
        if len(alphas := dict.fromkeys(self.settings.alphas_of(pair.module))) > 1:
            given = listing(f"{alpha:g}" for alpha in alphas)
            self.notes.append(f"{self.label}: alpha_pattern gives {pair.module} the alphas {given}; the first is taken")
        for name, edit in edits:
            self._add(name, edit)

    def _addition(self, module: str, leaf: str, stored: StoredTensor) -> None:
        """What is added to a tensor as it is (LyCORIS' full differences)."""
        name = self.homes.name(f"{module}.{leaf}", stored)
        target = self.homes.target(name)
        if stored.info.numel != target.info.numel or stored.info.shape[:1] != target.info.shape[:1]:
            self.homes.refuse_shape(module, stored.info.shape, target)
        flat = replace(stored.info, shape=target.info.shape)
        self._add(name, AddTensor(replace(stored, info=flat), self.settings.scale(module, 1)))

    def _tokens(self, module: str, stored: StoredTensor) -> None:
        name = self.homes.name(f"{module}.weight", stored)
        target = self.homes.target(name)
        indices = self.settings.token_indices
        if isinstance(indices, Mapping):
            indices = next((value for key, value in indices.items() if module.endswith(key)), None)
        if not isinstance(indices, list) or len(indices) != stored.info.rows:
            raise SourceError(
                f"{self.label}: {module} has {stored.info.rows} trained tokens; its config does not name them"
            )
        new = [index for index in indices if index >= target.info.rows]
        grown = sorted(new) == list(range(target.info.rows, target.info.rows + len(new)))
        if stored.info.columns != target.info.columns or not grown or min(indices) < 0:
            self.homes.refuse_shape(module, stored.info.shape, target)
        if new:
            self.resized[name] = ResizedEmbedding(target, stored, tuple(indices.index(index) for index in sorted(new)))
        if len(new) < len(indices):
            self._add(name, ReplaceRows(tuple(indices), stored))

    def _replacement(self, module: str, leaf: str, stored: StoredTensor) -> None:
        saved = self.settings.saves(module)
        found = self.homes.find(f"{module}.{leaf}")
        if not found:
            if not saved:
                self.homes.refuse_unknown(stored, f"{module}.{leaf}")
            self.added[f"{module}.{leaf}"] = StoredTensor(
                stored.info.renamed(f"{module}.{leaf}"), stored.file, stored.offset
            )
            self.notes.append(f"{self.label} adds {module}.{leaf}, which the base lacks: check the config's head")
        elif leaf == "weight" and not saved and module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS):
            self._resize(module, found, stored)  # saved beside a grown vocabulary, not trained as a module
        else:
            self.homes.check_size(module, stored, self.homes.target(found))
            self._add(found, ReplaceTensor(stored))

    def _add(self, name: str, edit: WeightDelta) -> None:
        self.edits.setdefault(name, []).append(edit)

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
        if both and same_rows(self.resized[head], self.resized[embedding]):
            del self.resized[head]
        edits, head_edits = self.edits.get(embedding, []), self.edits.get(head, [])
        if head in self.resized or not (edits or head_edits):
            return head not in self.resized
        if not head_edits:  # PEFT gives the trained tokens to a tied head too, and nothing else
            return all(isinstance(edit, ReplaceRows) for edit in edits)
        if len(edits) != 1 or len(head_edits) != 1 or not _same_change(edits[0], head_edits[0]):
            return False
        del self.edits[head]
        self.notes.append(f"{self.label}: its change of {head} is that of the tied {embedding}: made once, stays tied")
        return True

    def _whole(self, name: str) -> StoredTensor | None:
        """The tensor that the adapter brings in place of the base's, if it does nothing else to it."""
        edits, resized = self.edits.get(name, []), self.resized.get(name)
        replaced = [edit.value for edit in edits if isinstance(edit, ReplaceTensor)]
        if edits:
            return replaced[0] if len(edits) == len(replaced) == 1 else None
        return resized if isinstance(resized, StoredTensor) else None


def _same_change(one: WeightDelta, other: WeightDelta) -> bool:
    """Whether an embedding and its head are changed alike (ensure_weight_tying saves both)."""
    if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
        return one.indices == other.indices and same_content(one.value, other.value)
    if isinstance(one, LoraDelta) and isinstance(other, LoraDelta):
        factors = zip(one.plain_factors(), other.plain_factors(), strict=True)
        return one.scale == other.scale and all(mine.equal(theirs) for mine, theirs in factors)
    return False
