"""Match adapters of fused experts (PEFT's target_parameters) to a checkpoint that stores experts fused or separately.

PEFT wraps a module once per adapted parameter. The first parameter that the module defines is the innermost, and
its keys have the most `.base_layer`. Which parameter a pair of factors belongs to follows from target_parameters,
the shapes, and that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from mergeforge.adapters.expert_deltas import ExpertLoraDelta
from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.checkpoints.model import ModelSource
from mergeforge.tensors.stored import StoredTensor

_PARAMETER_ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")  # as modules define them
_TRANSPOSED_MODELS = ("gpt_oss", "llama4_text", "llama4", "dbrx")  # experts stored (E, in, out): is_transposed


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of one wrapped parameter, and the number of wrappers around it."""

    a: StoredTensor
    b: StoredTensor
    depth: int

    @property
    def delta_shape(self) -> tuple[int, int]:
        """(out, in) of B A."""
        return self.b.info.shape[0], self.a.info.shape[1]


def split_module(module: str) -> tuple[str, int]:
    """Split off PEFT's wrappers: the module's own path, and how many wrappers there are."""
    own = module
    while own.endswith(".base_layer"):
        own = own.removesuffix(".base_layer")
    return own, (len(module) - len(own)) // len(".base_layer")


LoadedTensors = Mapping[str, tuple[LoadedSlice, ...]]  # parameter of the loaded model -> its slices in the checkpoint


def is_expert_module(module: str, settings: LoraSettings, base: ModelSource, loaded: LoadedTensors) -> bool:
    """Whether target_parameters names parameters of the module."""
    return bool(_adapted_parameters(split_module(module)[0], settings, base, loaded))


def _adapted_parameters(module: str, settings: LoraSettings, base: ModelSource, loaded: LoadedTensors) -> list[str]:
    """The module's adapted parameters; a name without a module applies to every module that has the parameter."""
    names = [
        leaf
        for name in settings.target_parameters
        for owner, _, leaf in [name.rpartition(".")]
        if (module == owner or module.endswith(f".{owner}") if owner else _slices(f"{module}.{leaf}", base, loaded))
    ]
    return sorted(
        names, key=lambda leaf: _PARAMETER_ORDER.index(leaf) if leaf in _PARAMETER_ORDER else len(_PARAMETER_ORDER)
    )


def expert_deltas(
    module: str, pairs: Sequence[ExpertFactors], settings: LoraSettings, base: ModelSource, loaded: LoadedTensors
) -> dict[str, ExpertLoraDelta]:
    """The deltas for one module's wrapped parameters, by stored tensor.

    Raises ValueError if no assignment of factors to parameters fits the shapes.
    """
    leaves = _adapted_parameters(module, settings, base, loaded)
    pairs = sorted(pairs, key=lambda pair: -pair.depth)
    stacks = {leaf: _slices(f"{module}.{leaf}", base, loaded) for leaf in leaves}
    for assigned in permutations(leaves, len(pairs)):
        if list(assigned) == sorted(assigned, key=leaves.index) and all(
            _fits(pair, stacks[leaf], base) for pair, leaf in zip(pairs, assigned, strict=True)
        ):
            deltas: dict[str, ExpertLoraDelta] = {}
            for pair, leaf in zip(pairs, assigned, strict=True):
                deltas |= _deltas(f"{module}.{leaf}", pair, stacks[leaf], settings, base)
            return deltas
    shapes = ", ".join(str(list(pair.delta_shape)) for pair in pairs)
    parameters = {leaf: _stack_shape(slices, base) for leaf, slices in stacks.items()}
    raise ValueError(f"{module}: factors for {shapes} fit none of its parameters {parameters}")


def _slices(path: str, base: ModelSource, loaded: LoadedTensors) -> tuple[LoadedSlice, ...]:
    """The slices of a parameter of the loaded model; a stack that is stored whole is one slice without an expert."""
    for name in (path, *(name for name in base.tensors if name.endswith(f".{path}") or path.endswith(f".{name}"))):
        if name in base.tensors:
            return (LoadedSlice(name, base.tensors[name].info.shape[0]),)
    names = (name for name in loaded if name == path or name.endswith(f".{path}") or path.endswith(f".{name}"))
    return next((loaded[name] for name in names), ())


def _stack_shape(parts: Sequence[LoadedSlice], base: ModelSource) -> tuple[int, ...]:
    """(experts, rows, columns) of a stack, stored fused or separately; () for none."""
    if not parts:
        return ()
    info = base.tensors[parts[0].name].info
    if parts[0].expert is None:
        return tuple(info.shape)
    experts = 1 + max(part.expert or 0 for part in parts)
    return experts, max(part.loaded_start + part.rows for part in parts), info.shape[1]


def _fits(pair: ExpertFactors, parts: Sequence[LoadedSlice], base: ModelSource) -> bool:
    shape = _stack_shape(parts, base)
    counts = (pair.a.info.shape[0], pair.b.info.shape[1])
    return (
        len(shape) == 3
        and counts[0] == counts[1]
        and counts[0] % shape[0] == 0
        and set(pair.delta_shape) == set(shape[1:])
    )


def _is_transposed(pair: ExpertFactors, shape: tuple[int, ...], settings: LoraSettings, base: ModelSource) -> bool:
    """Whether the stack holds (B_e A_e)^T, by the shapes; for square experts, by PEFT's version and the model.

    PEFT before 0.19 always assumed (E, in, out); since then the module decides (is_transposed).
    """
    if shape[1] != shape[2]:
        return pair.delta_shape != (shape[1], shape[2])
    inner = base.config.get("text_config")
    kinds = [base.config.get("model_type"), inner.get("model_type") if isinstance(inner, Mapping) else None]
    return settings.peft_version < (0, 19) or any(kind in _TRANSPOSED_MODELS for kind in kinds)


def _deltas(
    parameter: str, pair: ExpertFactors, parts: Sequence[LoadedSlice], settings: LoraSettings, base: ModelSource
) -> dict[str, ExpertLoraDelta]:
    shape = _stack_shape(parts, base)
    rank = pair.a.info.shape[0] // shape[0]
    scale = settings.scale(parameter, rank)
    swapped = _is_transposed(pair, shape, settings, base)
    return {
        part.name: ExpertLoraDelta(
            a=pair.a,
            b=pair.b,
            experts=shape[0],
            scale=scale,
            expert_rows=part.rows if part.expert is not None else shape[1],
            expert=part.expert,
            loaded_start=part.loaded_start,
            transposed=swapped,
            expert_major=settings.expert_major,
        )
        for part in parts
    }
