"""Match the tensors of a PEFT adapter, one by one, to the checkpoint that it is folded into.

The file's keys decide: each must match exactly one tensor of the base (or slices of some) and its shape, or the
adapter is refused. The config only decides what the tensors do not show, such as the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.deltas import AddTensor, ReplaceRows, ReplaceTensor, WeightDelta, same_deltas
from mergeforge.adapters.lora import LoraFactors, check_rank, lora_deltas, take_factors
from mergeforge.adapters.match_experts import ExpertFactors, expert_deltas, is_expert_module, split_module
from mergeforge.adapters.match_method import MethodMatcher
from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.adapters.peft.keys import (
    UNUSED,
    Key,
    adapter_names,
    clean_path,
    parse_key,
    without_adapter_name,
)
from mergeforge.adapters.peft.kind import PeftMethod
from mergeforge.adapters.peft.lora_config import LoraSettings, describe_init
from mergeforge.adapters.resized_embedding import ResizedEmbedding, same_rows
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.ties import Tie
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content


@dataclass(frozen=True)
class Adapter:
    """An adapter that is ready to fold: deltas by tensor name.

    `resized`: tensors that replace the base's before the deltas apply (an embedding saved with a resized
    vocabulary). `added`: tensors that the base does not have (a new head). `breaks_ties`: it changes names of a tied
    tensor differently; a change of all of them alike is under every name. `parameters`: tensors that it changes as
    parameters of modules that are not linear (fused experts, routers); bitsandbytes leaves these in 16 bits.
    task_type: what PEFT says that it was trained for, such as SEQ_CLS.
    """

    label: str
    folder: Path
    revision: str | None
    deltas: Mapping[str, tuple[WeightDelta, ...]]
    resized: Mapping[str, LazyTensor]
    added: Mapping[str, StoredTensor]
    breaks_ties: bool
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...]
    parameters: frozenset[str] = frozenset()
    task_type: str = ""


@dataclass
class AdapterMatcher:
    """Matches one adapter: groups its keys by module, then makes the deltas of each module."""

    label: str
    base: ModelSource
    checkpoint: Checkpoint
    settings: LoraSettings
    method: PeftMethod | None
    config: Mapping[str, Any]
    aliases: Mapping[str, tuple[LoadedSlice, ...]] = field(default_factory=dict)
    deltas: dict[str, list[WeightDelta]] = field(default_factory=dict)
    resized: dict[str, LazyTensor] = field(default_factory=dict)
    added: dict[str, StoredTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._strip_adapter_name()
        self.resolver = TensorResolver(self.label, self.base, self.resized, self.aliases)

    def match(self, folder: Path, revision: str | None) -> Adapter:
        """Match all tensors. Raises SourceError if some match no tensor of the base, or have the wrong shape."""
        modules = self._group_by_module()
        if not modules:
            raise SourceError(f"{self.label} contains no tensors", hint="was it saved from an unwrapped model?")
        for module, roles in modules.items():
            with self.resolver.collecting_errors():
                self._take_base_weight(module, roles)
        if self.method:
            matcher = MethodMatcher(self.label, self.base, self.config, self.method, self.resolver)
            for name, delta in matcher.match(modules):
                self._add_delta(name, delta)
            self.notes += matcher.notes
        if self.settings.target_parameters:
            self._match_experts(modules)
        for module, roles in modules.items():
            with self.resolver.collecting_errors():
                self._match_module(module, roles)
        self.resolver.check()
        stay_tied = [self._stays_tied(tie) for tie in self.resolver.ties.ties]
        if self.method is None and (note := describe_init(self.config, self.settings)):
            self.notes.append(f"{self.label}: {note}")
        self._note_other_base()
        return Adapter(
            self.label,
            folder,
            revision,
            {name: tuple(deltas) for name, deltas in self.deltas.items()},
            self.resized,
            self.added,
            not all(stay_tied),
            (self.checkpoint,),
            tuple(dict.fromkeys((*self.checkpoint.warnings, *self.notes))),
            frozenset(self.parameters),
            str(self.config.get("task_type") or ""),
        )

    def _strip_adapter_name(self) -> None:
        """Rename the tensors of a state_dict() dump, whose keys contain the adapter's name."""
        names = adapter_names(self.checkpoint.tensors)
        if len(names) > 1:
            text = f"{self.label} holds the tensors of several adapters: {format_list(names)}"
            raise SourceError(text, hint="save each in a folder of its own, with PEFT's save_pretrained")
        if names and names[0] != "default":
            tensors = {
                (clean := without_adapter_name(name, names[0])): replace(stored, info=stored.info.renamed(clean))
                for name, stored in self.checkpoint.tensors.items()
            }
            self.checkpoint = replace(self.checkpoint, tensors=tensors)

    def _note_other_base(self) -> None:
        """Add a note if the adapter was trained on another base, or another revision of it."""
        trained_on, commit = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if trained_on and Path(str(trained_on)).name != Path(self.base.label.split("@")[0]).name:
            self.notes.append(f"{self.label} was trained on {trained_on}, but is folded into {self.base.label}")
        base_revisions = [getattr(self.base, "revision", None), self.base.label.partition("@")[2]]
        if (
            commit
            and any(base_revisions)
            and not any(revision and revision.startswith(str(commit)) for revision in base_revisions)
        ):
            trained = f"revision {commit} of {trained_on or 'its base'}"
            folded = base_revisions[0] or base_revisions[1]
            self.notes.append(f"{self.label} was trained on {trained}, but is folded into {folded}")

    def _group_by_module(self) -> dict[str, dict[str, StoredTensor]]:
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in self.checkpoint.tensors.items():
            key = self._parse_key(name)
            if key is None:
                method = self.method.name if self.method else "LoRA"
                raise SourceError(f"{self.label}: unknown tensor {name!r}", hint=f"is it a {method} adapter?")
            if stored.info.numel == 0 and not (self.method and self.method.may_be_empty):
                hint = "DeepSpeed ZeRO-3 saved it without gathering the weights; save it again with them gathered"
                raise SourceError(f"{self.label}: {name!r} is empty (shape {list(stored.info.shape)})", hint=hint)
            if not stored.info.is_float and not (self.method and stored.info.dtype[0] in "UI"):
                raise SourceError(f"{self.label}: {name!r} has dtype {stored.info.dtype}, not a float")
            if key.role == UNUSED:
                continue
            roles = modules.setdefault(key.module, {})
            if key.role in roles and not same_content(roles[key.role], stored):
                first = roles[key.role].info.name
                raise SourceError(f"{self.label}: {name!r} duplicates {first!r} with different values")
            roles[key.role] = stored
        return modules

    def _parse_key(self, name: str) -> Key | None:
        own = self.method.parse_key(clean_path(name)) if self.method else None
        return Key(*own) if own else parse_key(name)

    def _match_experts(self, modules: dict[str, dict[str, StoredTensor]]) -> None:
        """Make deltas of the stack, or of each expert, from the factors of fused experts."""
        wrapped: dict[str, list[ExpertFactors]] = {}
        for module in [
            name for name in modules if is_expert_module(name, self.settings, self.base, self.resolver.loaded)
        ]:
            own, depth = split_module(module)
            if {"A", "B"} <= modules[module].keys():
                a, b = modules[module].pop("A"), modules[module].pop("B")
                if name := self.resolver.find(f"{own}.weight"):
                    self.parameters.add(name)
                    self._add_lora(LoraFactors(own, a, b))  # one matrix, such as a router's
                else:
                    wrapped.setdefault(own, []).append(ExpertFactors(a, b, depth))
        for own, pairs in wrapped.items():
            try:
                deltas = expert_deltas(own, pairs, self.settings, self.base, self.resolver.loaded)
            except ValueError as error:
                raise SourceError(f"{self.label}: {error}", hint="is it an adapter of this model?") from None
            for name, delta in deltas.items():
                self.parameters.add(name)
                self._add_delta(name, delta)
        if wrapped:
            layout = "Unsloth's layout (expert-major)" if self.settings.expert_major else "PEFT's layout"
            self.notes.append(f"{self.label}: lora_B of its {len(wrapped)} expert modules is read in {layout}")

    def _take_base_weight(self, module: str, roles: dict[str, StoredTensor]) -> None:
        """Take the initial weight if the adapter has it: an embedding of another size."""
        original, _ = roles.pop("original_weight", None), roles.pop("original_bias", None)
        if (stored := roles.pop("base_weight", original)) is not None:
            self._resize(module, self.resolver.require(f"{module}.weight", stored), stored)

    def _resize(self, module: str, name: str, stored: StoredTensor) -> None:
        self.resolver.check_size(module, stored, self.resolver.target(name))
        self.resized[name] = stored

    def _match_module(self, module: str, roles: dict[str, StoredTensor]) -> None:
        if pair := take_factors(module, roles):
            check_rank(pair, self.settings, self.label)
            self._add_lora(pair)
        if (tokens := roles.pop("tokens", None)) is not None:
            self._match_tokens(module, tokens)
        for role, leaf in (("weight", "weight"), ("bias", "bias"), ("base_bias", "bias")):
            if (stored := roles.pop(role, None)) is not None:
                self._match_saved(module, leaf, stored)
        for role, leaf in (("added", "weight"), ("added_bias", "bias")):
            if (stored := roles.pop(role, None)) is not None:
                self._add_difference(module, leaf, stored)
        if roles:
            _, stored = next(iter(roles.items()))
            raise SourceError(f"{self.label}: {stored.info.name!r} has no matching factor in its module")

    def _add_lora(self, pair: LoraFactors) -> None:
        deltas, notes = lora_deltas(pair, self.settings, self.resolver)
        self.notes += notes
        if len(alphas := dict.fromkeys(self.settings.alphas_of(pair.module))) > 1:
            values = format_list(f"{alpha:g}" for alpha in alphas)
            self.notes.append(f"{self.label}: alpha_pattern matches {pair.module} with {values}; the first is used")
        for name, delta in deltas:
            self._add_delta(name, delta)

    def _add_difference(self, module: str, leaf: str, stored: StoredTensor) -> None:
        """Add a full difference (LyCORIS' diff) to a tensor."""
        name = self.resolver.require(f"{module}.{leaf}", stored)
        target = self.resolver.target(name)
        if stored.info.numel != target.info.numel or stored.info.shape[:1] != target.info.shape[:1]:
            self.resolver.refuse_shape(module, stored.info.shape, target)
        flat = replace(stored.info, shape=target.info.shape)
        self._add_delta(name, AddTensor(replace(stored, info=flat), self.settings.scale(module, 1)))

    def _match_tokens(self, module: str, stored: StoredTensor) -> None:
        name = self.resolver.require(f"{module}.weight", stored)
        target = self.resolver.target(name)
        indices = self.settings.token_indices
        if isinstance(indices, Mapping):
            indices = next((value for key, value in indices.items() if module.endswith(key)), None)
        if not isinstance(indices, list) or len(indices) != stored.info.rows:
            raise SourceError(
                f"{self.label}: {module} has {stored.info.rows} trained tokens, but its config does not list them"
            )
        new_rows = [index for index in indices if index >= target.info.rows]
        is_contiguous = sorted(new_rows) == list(range(target.info.rows, target.info.rows + len(new_rows)))
        if stored.info.columns != target.info.columns or not is_contiguous or min(indices) < 0:
            self.resolver.refuse_shape(module, stored.info.shape, target)
        if new_rows:
            self.resized[name] = ResizedEmbedding(
                target, stored, tuple(indices.index(index) for index in sorted(new_rows))
            )
        if len(new_rows) < len(indices):
            self._add_delta(name, ReplaceRows(tuple(indices), stored))

    def _match_saved(self, module: str, leaf: str, stored: StoredTensor) -> None:
        saved = self.settings.saves(module)
        name = self.resolver.find(f"{module}.{leaf}")
        if not name:
            if not saved:
                self.resolver.refuse_unknown(stored, f"{module}.{leaf}")
            self.added[f"{module}.{leaf}"] = StoredTensor(
                stored.info.renamed(f"{module}.{leaf}"), stored.file, stored.offset
            )
            note = (
                f"{self.label} adds {module}.{leaf}, which the base does not have; check the model class in the config"
            )
            self.notes.append(note)
        elif not saved and self.resolver.ties.has_token_rows(name):
            self._resize(module, name, stored)  # saved because the vocabulary was resized, not trained as a module
        else:
            self.resolver.check_size(module, stored, self.resolver.target(name))
            self._add_delta(name, ReplaceTensor(stored))

    def _add_delta(self, name: str, delta: WeightDelta) -> None:
        self.deltas.setdefault(name, []).append(delta)

    def _stays_tied(self, tie: Tie) -> bool:
        """Whether the adapter changes all names of a tied tensor alike; such a change is then under every name."""
        if not any(self.deltas.get(name) or name in self.resized for name in tie.names):
            return True
        if not all(self._is_one_tensor(tie.origin, name) for name in tie.stored):
            return False  # the flag says that they are tied, but they are not
        replacements = [self._whole_replacement(name) for name in tie.names]
        if replacements[0] and all(value and same_content(replacements[0], value) for value in replacements):
            for name in tie.names:
                self.resized.pop(name, None)
                self.deltas[name] = [ReplaceTensor(replacements[0])]
            return True
        if not self._share_resized(tie):
            return False
        changed = [name for name in tie.names if self.deltas.get(name)]
        if not changed:
            return True
        deltas = self.deltas[changed[0]]
        if not all(same_deltas(deltas, self.deltas[name]) for name in changed[1:]):
            return False
        if len(changed) < len(tie.names) and not self._applies_to_all(deltas, changed):
            return False
        self.deltas |= dict.fromkeys(tie.names, deltas)
        if len(changed) > 1:
            text = f"its changes of {format_list(changed)}, which are tied, are equal; applied once, they stay tied"
            self.notes.append(f"{self.label}: {text}")
        return True

    def _is_one_tensor(self, origin: str, name: str) -> bool:
        """Whether two tensors that the base stores and its config ties are equal."""
        first, second = self.base.tensors[origin], self.base.tensors[name]
        if isinstance(first, StoredTensor) and isinstance(second, StoredTensor):
            return name == origin or same_content(first, second)
        return first is second

    def _share_resized(self, tie: Tie) -> bool:
        """Give a tensor that was saved in another size to every name; False if the adapter has several."""
        resized = [self.resized[name] for name in tie.names if name in self.resized]
        if resized and all(same_rows(resized[0], other) for other in resized[1:]):
            self.resized |= dict.fromkeys(tie.names, resized[0])
        return not resized or all(name in self.resized and self.resized[name] is resized[0] for name in tie.names)

    def _applies_to_all(self, deltas: list[WeightDelta], changed: list[str]) -> bool:
        """PEFT applies trained tokens of the input embedding to the tensors tied to it, and nothing else."""
        return self.resolver.ties.embedding in changed and all(isinstance(delta, ReplaceRows) for delta in deltas)

    def _whole_replacement(self, name: str) -> StoredTensor | None:
        """The tensor with which the adapter replaces the base's, if it does nothing else to it."""
        deltas, resized = self.deltas.get(name, []), self.resized.get(name)
        replaced = [delta.value for delta in deltas if isinstance(delta, ReplaceTensor)]
        if deltas:
            return replaced[0] if len(deltas) == len(replaced) == 1 else None
        return resized if isinstance(resized, StoredTensor) else None
