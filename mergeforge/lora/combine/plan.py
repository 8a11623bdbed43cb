"""What is joined, decided from headers: the terms of every tensor's sum, and whether they are a sum at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.adapters.open import Adapter
from mergeforge.adapters.peft.keys import parse_key
from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.checkpoints.names import tied_head
from mergeforge.core.sizes import show_size
from mergeforge.errors import BudgetError, RecipeError, SourceError
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content

Terms = Mapping[str, Sequence[tuple[float, WeightDelta]]]  # tensor -> (weight, edit) of every adapter that changes it


@dataclass(frozen=True)
class Sum:
    """What is joined for one tensor. `module`: its name in the adapters; `ranks` of the terms together."""

    tensor: str
    module: str
    terms: tuple[tuple[float, LoraDelta], ...]
    shape: tuple[int, int]
    embedding: bool

    @property
    def rank(self) -> int:
        return sum(edit.rank for _, edit in self.terms)

    @property
    def transposed(self) -> bool:
        return self.terms[0][1].transposed

    @property
    def nbytes(self) -> int:
        """The memory that cutting takes: both stacks, their Q and LAPACK's copies in float64, the core."""
        return 8 * self.rank * (4 * sum(self.shape) + 6 * self.rank)


@dataclass(frozen=True)
class Join:
    """A planned adapter: headers are read, the memory is proved."""

    adapters: tuple[Adapter, ...]
    base: ModelSource
    sums: tuple[Sum, ...]
    rank: int | None
    energy: float | None
    dtype: str

    @property
    def exact(self) -> bool:
        return self.rank is None and self.energy is None


def weighted_terms(adapters: Sequence[Adapter], weights: Sequence[float]) -> Terms:
    """One weight for all of an adapter."""
    terms: dict[str, list[tuple[float, WeightDelta]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, edits in adapter.edits.items():
            terms.setdefault(name, []).extend((weight, edit) for edit in edits)
    return terms


def folded_terms(ways: Mapping[str, LazyTensor], base: ModelSource, adapters: Sequence[Adapter]) -> Terms:
    """The terms of a planned merge, as its method, weights and rules made them.

    Raises RecipeError where a tensor comes about in any way but the base's own plus adapters' changes.
    """
    terms = {}
    for name, way in ways.items():
        start = way.base if isinstance(way, AdaptedTensor) else way
        if start is not base.tensors.get(name) and not any(name in one.resized for one in adapters):
            hint = "merge_method linear or task_arithmetic over adapters alone, without models, keeps them factors"
            raise RecipeError(f"output.adapter: {name} is more than the base plus weighted adapters", hint=hint)
        if isinstance(way, AdaptedTensor):
            terms[name] = way.terms
    return terms


def plan_join(
    adapters: Sequence[Adapter],
    terms: Terms,
    base: ModelSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    memory: int = 2 << 30,
) -> Join:
    """Decide the joined adapter from headers. Neither rank nor energy: the exact sum.

    Raises RecipeError for a rank, energy or dtype that makes no sense, SourceError for adapters that
    are more than low-rank factors, BudgetError where a module does not fit `memory` (bytes).
    """
    if rank is not None and rank < 1:
        raise RecipeError(f"the rank of an adapter is at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy is a share of the squared change, above 0 and at most 1, not {energy:g}")
    if dtype not in OUT_DTYPES or dtype == "float64":
        raise RecipeError(f"an adapter is float32, bfloat16 or float16, not {dtype}")
    for adapter in adapters:
        _check_plain(adapter, base)
    sums = tuple(one for name in sorted(terms) if (one := _sum(name, terms[name])) is not None)
    if not sums:
        raise SourceError("the adapters, as they are weighted, change nothing: there is no sum to write")
    widest = max(sums, key=lambda one: one.nbytes)
    if widest.nbytes > memory:
        text = f"{widest.module}: joining ranks of {widest.rank} takes {show_size(widest.nbytes)}"
        raise BudgetError(f"{text}, {show_size(memory)} given", hint=f"--memory {-(-widest.nbytes >> 20)}MiB")
    return Join(tuple(adapters), base, sums, rank, energy, dtype)


def _check_plain(adapter: Adapter, base: ModelSource) -> None:
    """Raises SourceError where an adapter is more than low-rank factors."""
    hint = "merge it into the model: leave output.adapter out"
    for name, edits in adapter.edits.items():
        if other := next((edit for edit in edits if not isinstance(edit, LoraDelta)), None):
            text = f"{adapter.label}: its change of {name} ({other.label}) is no pair of low-rank factors"
            raise SourceError(f"{text}, so it cannot be joined with others", hint=hint)
    tied = tied_head(base)
    if tied and adapter.keeps_tied and tied[1] in adapter.edits:
        text = f"{adapter.label} changes {tied[1]}, which is the output head too"
        raise SourceError(f"{text}: as an adapter that would mean two things", hint=hint)
    if whole := [*adapter.added, *(name for name in adapter.resized if not _is_bases(name, adapter, base))]:
        raise SourceError(f"{adapter.label} brings a whole {whole[0]}, which has no place in a sum", hint=hint)


def _is_bases(name: str, adapter: Adapter, base: ModelSource) -> bool:
    """Whether a tensor that came with the adapter is the base's own, as PEFT saves it beside an embedding's factors."""
    held, brought = base.tensors.get(name), adapter.resized[name]
    return isinstance(held, StoredTensor) and isinstance(brought, StoredTensor) and same_content(brought, held)


def _sum(name: str, terms: Sequence[tuple[float, WeightDelta]]) -> Sum | None:
    kept = tuple((weight, edit) for weight, edit in terms if weight and isinstance(edit, LoraDelta))
    if not kept:
        return None
    edit = kept[0][1]
    left, right = edit.left.info.shape, edit.right.info.shape
    shape = (left[1], right[0]) if edit.transposed else (left[0], right[1])
    key = parse_key(edit.left.info.name)
    module = key.module if key else name.rpartition(".")[0]
    return Sum(name, module, kept, shape, "lora_embedding_" in edit.left.info.name)
