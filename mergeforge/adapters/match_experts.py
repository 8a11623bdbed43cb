"""Adapters of fused experts (PEFT's target_parameters), matched to a checkpoint that holds them fused or apart.

PEFT wraps a module once for each parameter: the first that the module defines is the innermost, whose keys
have the most `.base_layer`. Which it is is told by target_parameters, the shapes, and that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from mergeforge.adapters.expert_deltas import ExpertLoraDelta
from mergeforge.adapters.peft.hf_renames import Part
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.tensors.stored import StoredTensor

_ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")  # as modules define them
_TRANSPOSED = ("gpt_oss", "llama4_text", "llama4", "dbrx")  # experts stored (E, in, out): is_transposed


@dataclass(frozen=True)
class Pair:
    """The factors of one wrapped parameter, and how deep in the module it is wrapped."""

    a: StoredTensor
    b: StoredTensor
    depth: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of B A."""
        return self.b.info.shape[0], self.a.info.shape[1]


def split_module(module: str) -> tuple[str, int]:
    """The module's own path, and how often it is wrapped outside."""
    own = module
    while own.endswith(".base_layer"):
        own = own.removesuffix(".base_layer")
    return own, (len(module) - len(own)) // len(".base_layer")


Loaded = Mapping[str, tuple[Part, ...]]  # parameters of the loaded model -> where they lie in the checkpoint


def is_expert_module(module: str, settings: LoraSettings, base: ModelSource, loaded: Loaded) -> bool:
    """Whether target_parameters names parameters of the module."""
    return bool(_leaves(split_module(module)[0], settings, base, loaded))


def _leaves(module: str, settings: LoraSettings, base: ModelSource, loaded: Loaded) -> list[str]:
    """The module's parameters that are adapted; a name without a module is one of every module that has it."""
    found = [
        leaf
        for name in settings.target_parameters
        for owner, _, leaf in [name.rpartition(".")]
        if (module == owner or module.endswith(f".{owner}") if owner else _parts(f"{module}.{leaf}", base, loaded))
    ]
    return sorted(found, key=lambda leaf: _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER))


def expert_edits(
    module: str, pairs: Sequence[Pair], settings: LoraSettings, base: ModelSource, loaded: Loaded
) -> dict[str, ExpertLoraDelta]:
    """Edits by stored tensor for one module's wrapped parameters.

    Raises ValueError where no assignment of factors to parameters fits their shapes.
    """
    leaves = _leaves(module, settings, base, loaded)
    pairs = sorted(pairs, key=lambda pair: -pair.depth)
    stacks = {leaf: _parts(f"{module}.{leaf}", base, loaded) for leaf in leaves}
    for chosen in permutations(leaves, len(pairs)):
        if list(chosen) == sorted(chosen, key=leaves.index) and all(
            _fits(pair, stacks[leaf], base) for pair, leaf in zip(pairs, chosen, strict=True)
        ):
            edits: dict[str, ExpertLoraDelta] = {}
            for pair, leaf in zip(pairs, chosen, strict=True):
                edits |= _edits(f"{module}.{leaf}", pair, stacks[leaf], settings, base)
            return edits
    shapes = ", ".join(str(list(pair.sizes)) for pair in pairs)
    held = {leaf: _shape(parts, base) for leaf, parts in stacks.items()}
    raise ValueError(f"{module}: factors for {shapes} fit none of its parameters {held}")


def _parts(path: str, base: ModelSource, loaded: Loaded) -> tuple[Part, ...]:
    """Where a parameter of the loaded model lies in the checkpoint; a stack as it is has one part without an expert."""
    for name in (path, *(name for name in base.tensors if name.endswith(f".{path}") or path.endswith(f".{name}"))):
        if name in base.tensors:
            return (Part(name, base.tensors[name].info.shape[0]),)
    near = (name for name in loaded if name == path or name.endswith(f".{path}") or path.endswith(f".{name}"))
    return next((loaded[name] for name in near), ())


def _shape(parts: Sequence[Part], base: ModelSource) -> tuple[int, ...]:
    """(experts, rows, columns) of a stack, fused or apart; () for none."""
    if not parts:
        return ()
    info = base.tensors[parts[0].name].info
    if parts[0].expert is None:
        return tuple(info.shape)
    experts = 1 + max(part.expert or 0 for part in parts)
    return experts, max(part.first + part.rows for part in parts), info.shape[1]


def _fits(pair: Pair, parts: Sequence[Part], base: ModelSource) -> bool:
    shape = _shape(parts, base)
    counts = (pair.a.info.shape[0], pair.b.info.shape[1])
    return (
        len(shape) == 3 and counts[0] == counts[1] and counts[0] % shape[0] == 0 and set(pair.sizes) == set(shape[1:])
    )


def _swapped(pair: Pair, shape: tuple[int, ...], settings: LoraSettings, base: ModelSource) -> bool:
    """Whether the stack holds (B_e A_e)^T: told by the shapes; square experts by PEFT's version and the model.

    PEFT before 0.19 always took (E, in, out); since then the module says so (is_transposed).
    """
    if shape[1] != shape[2]:
        return pair.sizes != (shape[1], shape[2])
    inner = base.config.get("text_config")
    kinds = [base.config.get("model_type"), inner.get("model_type") if isinstance(inner, Mapping) else None]
    return settings.peft_version < (0, 19) or any(kind in _TRANSPOSED for kind in kinds)


def _edits(
    parameter: str, pair: Pair, parts: Sequence[Part], settings: LoraSettings, base: ModelSource
) -> dict[str, ExpertLoraDelta]:
    shape = _shape(parts, base)
    rank = pair.a.info.shape[0] // shape[0]
    scale = settings.scale(parameter, rank)
    swapped = _swapped(pair, shape, settings, base)
    return {
        part.name: ExpertLoraDelta(
            a=pair.a,
            b=pair.b,
            experts=shape[0],
            scale=scale,
            rows=part.rows if part.expert is not None else shape[1],
            expert=part.expert,
            first=part.first,
            swapped=swapped,
            by_expert=settings.by_expert,
        )
        for part in parts
    }
