"""Merge methods: pure functions on blocks of tensors, one file each. A file in this package registers its methods.

    @method("linear", scratch_blocks=1)
    def linear(models, *, weight: list[float], normalize: bool = True): ...

A method gets one block (rows of one tensor, float32 or float64, on the worker's device) of every
input and returns the merged block; it may overwrite the blocks that it receives. Its keyword-only
arguments are its recipe parameters. The name of its first argument says what the inputs are:

* `models`: the weights themselves (an adapter alone is its delta; the base is then added);
* `deltas`: task vectors, input minus base; the result is added to the base.

A method that needs statistics of the whole tensor names a `stats` function. It is called before the
merge with a BlockScan, which runs a function over the blocks and yields the results in order; it may
scan as often as it needs. So no tensor has to fit into memory. `scratch_blocks` counts the block-sized
temporaries that exist at once besides the inputs; a test measures every method against it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergeforge.core.parameters import Interval, Parameter, parameters_of
from mergeforge.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods._weighted_sum import WeightedSum

R = TypeVar("R")
UNIT = Interval(0, 1)
DENSITY = Interval(0, 1, open_low=True)


@dataclass(frozen=True)
class Block:
    """The position of a block: its tensor, the flat index of its first element, and the merge's seed.

    `is_vector`: the tensor is 1-D, and its elements are the rows of the block.
    """

    tensor: str
    start: int
    seed: int
    is_vector: bool = False


class BlockScan(Protocol):
    """One pass over a tensor: run `visit(inputs, block)` on every block, or on about `sample` of them, in order.

    A scan may offer faster, native ways to get what methods need; a stats function looks for them with getattr():

    * `inner_products()` yields the blocks' inner products, as gram() adds them up;
    * `l1_norms(density=..., ranges=...)` yields for each block the L1 norm of each input, and of what remains of it
      after a random mask with a `density` or after `ranges` of magnitude (ratios_from_l1_norms);
    * `magnitude_samples(inputs)` returns the float32 bits of some magnitudes of each input;
    * `split_magnitudes(ranges)` yields for each block how many magnitudes of an input have bits above its range
      [low, high), and the bits inside it, minus `low`.

    Input numbers beyond the last input wrap around. A scan that has one of the last three has all three of them.
    """

    def __call__(self, visit: Callable[[list[Tensor], Block], R], sample: int = 0) -> Iterator[R]: ...


@dataclass(frozen=True)
class Method:
    """A merge method and what its registration declares; `inputs` is (fewest, most)."""

    name: str
    combine: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    on_deltas: bool
    needs_base: bool
    base_is_input: bool
    optional_base: bool
    inputs: tuple[int, int]
    stats: Callable[..., Any] | None
    stats_nbytes: int
    native_stats_nbytes: int
    as_sum: Callable[..., WeightedSum] | None
    sum_if: Callable[..., bool]
    check: Callable[..., None] | None
    scratch_blocks: int
    combine_arguments: frozenset[str]
    as_sum_arguments: frozenset[str]
    description: str

    def for_base(self, has_base: bool) -> Method:
        """Return the method as it works in a recipe with, or without, a base model."""
        return replace(self, on_deltas=True) if has_base and self.optional_base else self

    def __call__(self, inputs: list[Tensor], stats: Any, block: Block, parameters: Mapping[str, Any]) -> Tensor:
        available = {"stats": stats, "block": block}
        extra = {name: available[name] for name in available if name in self.combine_arguments}
        merged: Tensor = self.combine(inputs, **extra, **_as_arguments(parameters))
        return merged

    def is_sum(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the merged tensor is a weighted sum of the inputs."""
        return self.as_sum is not None and self.sum_if(**_as_arguments(parameters))

    def weighted_sum(
        self, stats: Any, count: int, block: Block, compute: str, parameters: Mapping[str, Any]
    ) -> WeightedSum:
        """The merge of `count` inputs as a weighted sum; only where is_sum().

        `block`: the tensor's first.
        """
        assert self.as_sum is not None
        available = {"stats": stats, "count": count, "block": block, "compute": compute}
        extra = {name: available[name] for name in available if name in self.as_sum_arguments}
        return self.as_sum(**extra, **_as_arguments(parameters))

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError when the values of one tensor contradict each other."""
        if self.check is not None:
            self.check(**_as_arguments(parameters))

    def collect_stats(self, scan: BlockScan, numel: int, parameters: Mapping[str, Any]) -> Any:
        """The statistics of a tensor that combining needs; None for a method that needs none."""
        if self.stats is None:
            return None
        return self.stats(scan, numel, **_as_arguments(parameters))


METHODS: Registry[Method] = Registry("merge method", __name__)


def method(
    *names: str,
    scratch_blocks: int,
    inputs: tuple[int, int] = (1, 1 << 16),
    base_is_input: bool = False,
    optional_base: bool = False,
    stats: Callable[..., Any] | None = None,
    stats_nbytes: int = 0,
    native_stats_nbytes: int = 0,
    as_sum: Callable[..., WeightedSum] | None = None,
    sum_if: Callable[..., bool] = lambda **_: True,
    check: Callable[..., None] | None = None,
    within: Mapping[str, Interval] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a merge method under one or more names.

    `base_is_input`: the base model is the first input (slerp).
    `optional_base`: the method works on task vectors if the recipe has a base model (nuslerp).
    `stats`: a function (scan, numel, **parameters) that collects what combining needs; the result arrives as the
    argument `stats`. `stats_nbytes`: the memory that it holds for each input; `native_stats_nbytes`: the same where
    the native library scans the tensor.
    `as_sum`: the merge as a weighted sum of the inputs, for parameters that pass `sum_if`. It takes the parameters,
    and any of `stats`, `count` (number of inputs), `block` (the tensor's first) and `compute` ("F32" or "F64") that
    it names. The native library computes such sums in one pass, straight from the inputs' bytes.
    `check`: raises ValueError for parameters that contradict each other; called when the merge is planned.
    `within`: the interval in which a parameter must lie.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        arguments = list(inspect.signature(function).parameters)
        for name in names:
            entry = Method(
                name=name,
                combine=function,
                parameters=parameters_of(function, within or {}),
                on_deltas=arguments[0] == "deltas",
                needs_base=arguments[0] == "deltas" or base_is_input,
                base_is_input=base_is_input,
                optional_base=optional_base,
                inputs=inputs,
                stats=stats,
                stats_nbytes=stats_nbytes,
                native_stats_nbytes=native_stats_nbytes,
                as_sum=as_sum,
                sum_if=sum_if,
                check=check,
                scratch_blocks=scratch_blocks,
                combine_arguments=frozenset(arguments) & {"stats", "block"},
                as_sum_arguments=frozenset(inspect.signature(as_sum).parameters if as_sum else ()),
                description=(inspect.getdoc(function) or "").split("\n")[0],
            )
            METHODS.add(name, entry)
        return function

    return register


def _as_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe parameters as keyword arguments: `lambda` is a Python keyword."""
    return {"lambda_" if name == "lambda" else name: value for name, value in parameters.items()}
