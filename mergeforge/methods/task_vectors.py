"""The methods that add up task vectors, as a table: what is kept of each x how signs are reconciled x defaults.

    base + lambda * sum(weight_i * ratio_i * keep(delta_i))

ratio_i restores, with `rescale`, the L1 norm of what was dropped. SUM adds everything that is kept; CONSENSUS_SUM only
what has the elected sign (Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708). `normalize` divides by the sum
of the weights: of all inputs, or of those that agree. As in mergekit's generalized task arithmetic, a sum of weights
below 1e-8 divides by 1, each product is rounded before it is added, and lambda comes last: the results are equal, bit
for bit.

A method of this kind is a row of METHODS_ON_TASK_VECTORS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mergeforge.core.parameters import Interval, Parameter
from mergeforge.methods import DENSITY, UNIT, Method, register
from mergeforge.methods.keep import (
    Keep,
    KeepMagnitudes,
    KeepRandom,
    KeepRanks,
    KeepWhole,
    MagnitudeRange,
    l1_ratios,
)
from mergeforge.methods.kth_largest import SEARCH_NBYTES
from mergeforge.methods.reduction import Combine, Reduction
from mergeforge.methods.statistics import KthMagnitudes, L1Norms, Statistics

MIN_WEIGHT_SUM = 1e-8  # a smaller sum of weights divides by 1


@dataclass(frozen=True)
class Sparsifier:
    """What is kept of each task vector: `keep(statistics, **parameters)`.

    `parameters`: name -> (default, allowed values) of one number for each input. `searches`: thresholds that are
    searched for each input. `scratch_blocks`: temporaries in torch (Method).
    """

    keep: Callable[..., Keep]
    parameters: Mapping[str, tuple[float, Interval]] = field(default_factory=dict)
    searches: int = 0
    scratch_blocks: int = 0
    check: Callable[..., None] | None = None


@dataclass(frozen=True)
class TaskVectorMethod:
    """A row of the table. `rescale`: the default, or None for a method that keeps everything."""

    names: tuple[str, ...]
    sparsifier: Sparsifier
    combine: Combine
    normalize: bool
    rescale: bool | None
    description: str


def keep_whole(tensor: Statistics, **_: object) -> Keep:
    return KeepWhole()


def keep_largest(tensor: Statistics, *, density: Sequence[float], **_: object) -> Keep:
    """The max(1, int(density n)) largest elements; among equal magnitudes at the threshold the first ones."""
    counts = [
        (index, max(1, int(fraction * tensor.numel)))
        for index, fraction in enumerate(density)
        if fraction < 1 and tensor.numel
    ]
    thresholds = iter(tensor.collect(KthMagnitudes(counts)) if counts else [])
    trimmed = {index for index, _ in counts}
    return KeepMagnitudes(
        [MagnitudeRange(next(thresholds)) if index in trimmed else None for index in range(len(density))]
    )


def keep_middle(tensor: Statistics, *, density: Sequence[float], gamma: Sequence[float], **_: object) -> Keep:
    """int(density n) elements below the int(gamma n) largest."""
    counts: list[tuple[int, int]] = []  # for each trimmed input: elements in the range and above; elements above it
    trimmed = [index for index, fraction in enumerate(density) if fraction < 1]
    for index in trimmed:
        kept = int(density[index] * tensor.numel)
        smallest = max(0, tensor.numel - kept - int(gamma[index] * tensor.numel))
        counts += [(index, tensor.numel - smallest), (index, tensor.numel - smallest - kept)]
    thresholds = iter(tensor.collect(KthMagnitudes(counts)) if counts else [])
    ranges: dict[int, MagnitudeRange] = {index: MagnitudeRange(next(thresholds), next(thresholds)) for index in trimmed}
    return KeepMagnitudes([ranges.get(index) for index in range(len(density))])


def keep_random(tensor: Statistics, *, density: Sequence[float], **_: object) -> Keep:
    return KeepRandom(tuple(density), tensor.first_block)


def keep_by_rank(tensor: Statistics, *, density: Sequence[float], epsilon: Sequence[float], **_: object) -> Keep:
    return KeepRanks(tuple(density), tuple(epsilon), tensor.first_block)


def check_epsilon(*, density: Sequence[float], epsilon: Sequence[float], **_: object) -> None:
    for mean, spread in zip(density, epsilon, strict=True):
        if mean < 1 and not (mean - spread > 0 and mean + spread < 1):
            raise ValueError(f"density {mean:g} +/- epsilon {spread:g} is not within (0, 1): use a smaller epsilon")


WHOLE = Sparsifier(keep_whole)
LARGEST = Sparsifier(keep_largest, {"density": (1.0, DENSITY)}, searches=1)
MIDDLE = Sparsifier(keep_middle, {"density": (1.0, DENSITY), "gamma": (0.01, UNIT)}, searches=2, scratch_blocks=1)
RANDOM = Sparsifier(keep_random, {"density": (1.0, DENSITY)}, scratch_blocks=1)
BY_RANK = Sparsifier(
    keep_by_rank, {"density": (1.0, DENSITY), "epsilon": (0.15, UNIT)}, scratch_blocks=4, check=check_epsilon
)

SUM, SIGNS = Combine.SUM, Combine.CONSENSUS_SUM
METHODS_ON_TASK_VECTORS = [
    # Ilharco et al., Editing Models with Task Arithmetic, https://arxiv.org/abs/2212.04089.
    # With adapters alone this is the fold: W + sum(weight * B A alpha / r).
    TaskVectorMethod(
        ("task_arithmetic", "fold"), WHOLE, SUM, False, None,
        "base + lambda * sum(weight_i * delta_i); with normalize, divided by the sum of the weights.",
    ),
    # Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708
    TaskVectorMethod(
        ("ties",), LARGEST, SIGNS, True, False,
        "Keep each task vector's largest `density` fraction, elect a sign, average those that agree.",
    ),
    # Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099
    TaskVectorMethod(
        ("dare_linear",), RANDOM, SUM, False, True,
        "Keep each element with probability `density`, restore the L1 norm, add up with weights.",
    ),
    TaskVectorMethod(
        ("dare_ties",), RANDOM, SIGNS, False, True,
        "dare_linear, adding only elements that have the elected sign (TIES).",
    ),
    # Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795
    TaskVectorMethod(
        ("breadcrumbs",), MIDDLE, SUM, False, False,
        "Drop each delta's `gamma` largest elements, keep `density` of all below, add up.",
    ),
    TaskVectorMethod(
        ("breadcrumbs_ties",), MIDDLE, SIGNS, False, False,
        "breadcrumbs, adding only elements that have the elected sign (TIES).",
    ),
    # Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617
    TaskVectorMethod(
        ("della_linear",), BY_RANK, SUM, False, True,
        "Drop elements by magnitude rank within rows, restore the L1 norm, add up.",
    ),
    TaskVectorMethod(
        ("della",), BY_RANK, SIGNS, True, True,
        "della_linear, adding only elements that have the elected sign (TIES).",
    ),
]  # fmt: skip


def reduce_task_vectors(
    row: TaskVectorMethod,
    tensor: Statistics,
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool = False,
    int8_mask: bool = False,
    **sparsity: Any,
) -> Reduction:
    """The reduction of a row of the table. int8_mask has no effect: masks are never stored."""
    keep = row.sparsifier.keep(tensor, **sparsity)
    drops = any(fraction < 1 for fraction in sparsity.get("density", ()))
    ratios = l1_ratios(tensor.collect(L1Norms(keep))) if rescale and drops else [1.0] * len(weight)
    factors = [factor * ratio for factor, ratio in zip(weight, ratios, strict=True)]
    if row.combine == Combine.CONSENSUS_SUM:
        return Reduction(factors, row.combine, keep, weight, normalize, lambda_)
    plain = Reduction(weight, keep=keep, normalize=normalize, scale=lambda_, min_divisor=MIN_WEIGHT_SUM)
    if all(ratio == 1 for ratio in ratios):
        return plain
    # One factor for all (only after dropping at random, which no other program does alike), added in one pass.
    scale = lambda_ / plain.divisor(tensor.compute)
    return Reduction([scale * factor for factor in factors], keep=keep, fused=True)


def _parameters(row: TaskVectorMethod) -> dict[str, Parameter]:
    """In the order in which they are listed."""
    per_input = {
        name: Parameter(name, "float", True, False, *given) for name, given in row.sparsifier.parameters.items()
    }
    flags = {"normalize": row.normalize} | ({} if row.rescale is None else {"rescale": row.rescale})
    return {
        "weight": Parameter("weight", "float", True, True, None, None),
        **per_input,
        **{name: Parameter(name, "bool", False, False, default, None) for name, default in flags.items()},
        "lambda": Parameter("lambda", "float", False, False, 1.0, None),
        "int8_mask": Parameter("int8_mask", "bool", False, False, False, None),
    }


def register_row(row: TaskVectorMethod) -> None:
    """Make the method of a row available by its names."""
    sparsifier = row.sparsifier
    consensus_blocks = 4 if row.combine == Combine.CONSENSUS_SUM else 0
    for name in row.names:
        register(
            Method(
                name,
                _parameters(row),
                row.description,
                on_deltas=True,
                scratch_blocks=max(sparsifier.scratch_blocks, consensus_blocks),
                needs_stats=sparsifier is not WHOLE,
                stats_nbytes=sparsifier.searches * SEARCH_NBYTES,
                uses_position=sparsifier is not WHOLE,
                ranks_rows=sparsifier is BY_RANK,
                reduce=partial(reduce_task_vectors, row),
                check=sparsifier.check,
            )
        )


for _row in METHODS_ON_TASK_VECTORS:
    register_row(_row)
