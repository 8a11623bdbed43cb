"""Plan a combined adapter from headers: the terms of each tensor's sum, and whether they can be summed as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.adapters.open import Adapter
from mergeforge.adapters.peft.keys import parse_key
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.ties import tied_head
from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, RecipeError, SourceError
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content

Terms = Mapping[str, Sequence[tuple[float, WeightDelta]]]  # tensor -> (weight, delta) of every adapter that changes it


@dataclass(frozen=True)
class LoraSum:
    """The sum for one tensor. `module`: its name in the adapters; `rank`: of all terms together."""

    tensor: str
    module: str
    terms: tuple[tuple[float, LoraDelta], ...]
    shape: tuple[int, int]
    embedding: bool

    @property
    def rank(self) -> int:
        return sum(delta.rank for _, delta in self.terms)

    @property
    def transposed(self) -> bool:
        return self.embedding or self.terms[0][1].transposed

    @property
    def nbytes(self) -> int:
        """The memory for truncating: both concatenated factors, their Q, LAPACK's copies in float64, and the core."""
        return 8 * self.rank * (4 * sum(self.shape) + 6 * self.rank)


@dataclass(frozen=True)
class Combination:
    """A planned combined adapter. The headers have been read and the memory is proved."""

    adapters: tuple[Adapter, ...]
    base: ModelSource
    sums: tuple[LoraSum, ...]
    rank: int | None
    energy: float | None
    dtype: str

    @property
    def exact(self) -> bool:
        return self.rank is None and self.energy is None


def weighted_terms(adapters: Sequence[Adapter], weights: Sequence[float]) -> Terms:
    """The terms for one weight per adapter."""
    terms: dict[str, list[tuple[float, WeightDelta]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, deltas in adapter.deltas.items():
            terms.setdefault(name, []).extend((weight, delta) for delta in deltas)
    return terms


def folded_terms(tensors: Mapping[str, LazyTensor], base: ModelSource, adapters: Sequence[Adapter]) -> Terms:
    """The terms of a planned merge, with the weights that its method and parameters give.

    Raises RecipeError if a tensor is anything but the base's tensor plus weighted adapter deltas.
    """
    terms = {}
    for name, tensor in tensors.items():
        base_tensor = tensor.base if isinstance(tensor, AdaptedTensor) else tensor
        if base_tensor is not base.tensors.get(name) and not any(name in adapter.resized for adapter in adapters):
            hint = "use merge_method linear or task_arithmetic with adapters only, without models"
            raise RecipeError(f"output.adapter: {name} is more than the base plus weighted adapters", hint=hint)
        if isinstance(tensor, AdaptedTensor):
            terms[name] = tensor.terms
    return terms


def plan_combination(
    adapters: Sequence[Adapter],
    terms: Terms,
    base: ModelSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    memory: int = 2 << 30,
) -> Combination:
    """Plan the combined adapter; without rank and energy it is the exact sum.

    Raises RecipeError for an invalid rank, energy or dtype, SourceError for adapters that are more than low-rank
    factors, BudgetError if a module does not fit into `memory` (bytes).
    """
    if rank is not None and rank < 1:
        raise RecipeError(f"the rank of an adapter must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy is a fraction of the squared change, above 0 and at most 1, not {energy:g}")
    if dtype not in OUT_DTYPES or dtype == "float64":
        raise RecipeError(f"the dtype of an adapter must be float32, bfloat16 or float16, not {dtype}")
    for adapter in adapters:
        _check_only_lora(adapter, base)
    sums = tuple(lora_sum for name in sorted(terms) if (lora_sum := _lora_sum(name, terms[name])) is not None)
    if not sums:
        raise SourceError("the adapters, with these weights, change nothing, so there is nothing to write")
    widest = max(sums, key=lambda lora_sum: lora_sum.nbytes)
    if widest.nbytes > memory:
        text = f"{widest.module}: combining ranks of {widest.rank} in total takes {format_size(widest.nbytes)}"
        hint = f"set --memory {-(-widest.nbytes >> 20)}MiB"
        raise BudgetError(f"{text}, but the limit is {format_size(memory)}", hint=hint)
    return Combination(tuple(adapters), base, sums, rank, energy, dtype)


def _check_only_lora(adapter: Adapter, base: ModelSource) -> None:
    """Raises SourceError if an adapter is more than low-rank factors."""
    hint = "merge it into the model instead: remove output.adapter"
    for name, deltas in adapter.deltas.items():
        if unsupported := next((delta for delta in deltas if not isinstance(delta, LoraDelta)), None):
            text = f"{adapter.label}: its change of {name} ({unsupported.label}) is not a pair of low-rank factors"
            raise SourceError(f"{text}, so it cannot be combined with others", hint=hint)
    tied = tied_head(base)
    if tied and not adapter.breaks_ties and tied[1] in adapter.deltas:
        text = f"{adapter.label} changes {tied[1]}, which is also the output head"
        raise SourceError(f"{text}, so factors of it would be ambiguous", hint=hint)
    if replaced := [*adapter.added, *(name for name in adapter.resized if not _is_base_tensor(name, adapter, base))]:
        raise SourceError(f"{adapter.label} replaces {replaced[0]} as a whole, which cannot be summed", hint=hint)


def _is_base_tensor(name: str, adapter: Adapter, base: ModelSource) -> bool:
    """Whether a tensor of the adapter equals the base's, as PEFT saves it next to the factors of an embedding."""
    base_tensor, replacement = base.tensors.get(name), adapter.resized[name]
    return (
        isinstance(base_tensor, StoredTensor)
        and isinstance(replacement, StoredTensor)
        and same_content(replacement, base_tensor)
    )


def _lora_sum(name: str, terms: Sequence[tuple[float, WeightDelta]]) -> LoraSum | None:
    lora_terms = tuple((weight, delta) for weight, delta in terms if weight and isinstance(delta, LoraDelta))
    if not lora_terms:
        return None
    delta = lora_terms[0][1]
    key = parse_key(delta.left.info.name)
    module = key.module if key else name.rpartition(".")[0]
    return LoraSum(name, module, lora_terms, delta.shape, "lora_embedding_" in delta.left.info.name)
