"""Merge methods. A file in this package registers its methods; nothing else needs to know of them.

Most methods are *reductions* (reduction.py): from the recipe's parameters, and statistics where it needs any, a method
says what is kept of each input, how the inputs are combined and with which factors. It computes nothing itself:

    @reduction("linear", scratch_blocks=0)
    def linear(tensor, *, weight: list[float], normalize: bool = True):
        return Reduction(weight, normalize=normalize, fused=True)

Methods on task vectors that differ in what they keep and in how they reconcile signs are rows of a table
(task_vectors.py).

A method that is not a reduction is a function on blocks in torch:

    @method("half_sum", scratch_blocks=1)
    def half_sum(models, *, weight: list[float]): ...

It gets one block (rows of one tensor, float32 or float64, on the worker's device) of every input and returns the merged
block; it may overwrite the blocks that it receives. The name of its first argument says what the inputs are: `models`
(the weights themselves; an adapter alone is its delta, and the base is then added) or `deltas` (task vectors, input
minus base; the result is added to the base).

The keyword-only arguments of both kinds are their recipe parameters. Statistics are requested from `tensor`
(statistics.py), so no tensor has to fit into memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.core.parameters import Interval, Parameter, parameters_of
from mergeforge.core.registry import Registry
from mergeforge.methods.block import Block, BlockScan
from mergeforge.methods.reduction import Reduction
from mergeforge.methods.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DENSITY",
    "METHODS",
    "UNIT",
    "Block",
    "BlockScan",
    "Method",
    "Reduction",
    "Statistics",
    "method",
    "reduction",
]

UNIT = Interval(0, 1)
DENSITY = Interval(0, 1, open_low=True)
ANY_NUMBER = (1, 1 << 16)


@dataclass(frozen=True)
class Method:
    """A merge method and what its registration declares.

    `reduce`: (statistics, **parameters) -> Reduction, for parameters that pass `reduces`. `combine`: a function on
    blocks, for the others; `block_arguments`: which of `stats` and `block` it takes. `stats`: (statistics,
    **parameters) -> what `combine` gets as its argument `stats`.

    `inputs`: (fewest, most). `base_is_input`: the base model is the first input (slerp). `optional_base`: it works on
    task vectors if the recipe has a base model (nuslerp). `needs_stats`: statistics of the whole tensor come first;
    `stats_nbytes` is the memory that they take for each input. `uses_position`: the result of an element depends on
    where it is in the tensor. `ranks_rows`: it ranks the magnitudes of whole rows. `scratch_blocks`: the block-sized
    temporaries that exist at once besides the inputs in torch; a test measures every method against it.
    """

    name: str
    parameters: Mapping[str, Parameter]
    description: str
    on_deltas: bool
    scratch_blocks: int
    inputs: tuple[int, int] = ANY_NUMBER
    base_is_input: bool = False
    optional_base: bool = False
    needs_stats: bool = False
    stats_nbytes: int = 0
    uses_position: bool = False
    ranks_rows: bool = False
    reduce: Callable[..., Reduction] | None = None
    reduces: Callable[..., bool] = lambda **_: True
    combine: Callable[..., Tensor] | None = None
    block_arguments: frozenset[str] = frozenset()
    stats: Callable[..., Any] | None = None
    check: Callable[..., None] | None = None

    @property
    def needs_base(self) -> bool:
        return (self.on_deltas and not self.optional_base) or self.base_is_input

    def for_base(self, has_base: bool) -> Method:
        """Return the method as it works in a recipe with, or without, a base model."""
        return replace(self, on_deltas=True) if has_base and self.optional_base else self

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError when the values of one tensor contradict each other."""
        if self.check is not None:
            self.check(**_as_arguments(parameters))

    def is_reduction(self, parameters: Mapping[str, Any]) -> bool:
        """Whether prepare() returns a Reduction."""
        return self.reduce is not None and self.reduces(**_as_arguments(parameters))

    def prepare(self, tensor: Statistics, parameters: Mapping[str, Any]) -> Any:
        """Collect statistics, and return what merging the tensor needs: a Reduction, or the argument of `combine`."""
        if self.is_reduction(parameters):
            assert self.reduce is not None
            return self.reduce(tensor, **_as_arguments(parameters))
        return self.stats(tensor, **_as_arguments(parameters)) if self.stats else None

    def merge_block(self, inputs: list[Tensor], prepared: Any, block: Block, parameters: Mapping[str, Any]) -> Tensor:
        """Merge a block in torch, overwriting the inputs; `prepared`: what prepare() returned."""
        if isinstance(prepared, Reduction):
            return prepared.evaluate(inputs, block)
        assert self.combine is not None
        available = {"stats": prepared, "block": block}
        extra = {name: value for name, value in available.items() if name in self.block_arguments}
        return self.combine(inputs, **extra, **_as_arguments(parameters))


METHODS: Registry[Method] = Registry("merge method", __name__)


def register(entry: Method) -> Method:
    """Make a method available by its name."""
    return METHODS.add(entry.name, entry)


def reduction(
    *names: str, within: Mapping[str, Interval] | None = None, **declared: Any
) -> Callable[[Callable[..., Reduction]], Callable[..., Reduction]]:
    """Register a function (statistics, *, parameters) -> Reduction under one or more names (decorator).

    `within`: the interval in which a parameter must lie. `declared`: fields of Method.
    """

    def add(function: Callable[..., Reduction]) -> Callable[..., Reduction]:
        for name in names:
            fields = {"on_deltas": False, **declared}
            register(
                Method(name, parameters_of(function, within or {}), _first_line(function), reduce=function, **fields)
            )
        return function

    return add


def method(
    *names: str, within: Mapping[str, Interval] | None = None, **declared: Any
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function on blocks under one or more names (decorator).

    `stats`: a function (statistics, **parameters); what it returns arrives as the argument `stats`. `within`: the
    interval in which a parameter must lie. `declared`: fields of Method.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        arguments = list(inspect.signature(function).parameters)
        fields: dict[str, Any] = {
            "on_deltas": arguments[0] == "deltas",
            "needs_stats": "stats" in declared,
            "uses_position": "block" in arguments,
            "block_arguments": frozenset(arguments) & {"stats", "block"},
        }
        for name in names:
            known = parameters_of(function, within or {})
            register(Method(name, known, _first_line(function), combine=function, **(fields | declared)))
        return function

    return add


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]


def _as_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe parameters as keyword arguments: `lambda` is a Python keyword."""
    return {"lambda_" if name == "lambda" else name: value for name, value in parameters.items()}
