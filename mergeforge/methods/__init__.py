"""Merge methods: pure functions on blocks of tensors. One file each; its presence registers it.

    @method("linear", live=1)
    def linear(models, *, weight: list[float], normalize: bool = True): ...

A method gets one block (rows of one tensor, float32 or float64, on the worker's device) of every
input and returns the merged block; it may overwrite the blocks that it is given. Its keyword-only
arguments are its recipe parameters. Its first argument says what its inputs are:

* `models`: the weights themselves (an adapter alone is its delta; the base is then added);
* `deltas`: task vectors, input minus base; the result is added to the base.

A method that needs facts about the whole tensor names a `facts` function. It is called first with
`look`, which runs a function over the blocks and yields the results in order; it may look as often
as it needs. So no tensor has to fit into memory. `live` counts the block-sized temporaries that
exist at once besides the inputs; a test holds every method to it.
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
    """Where a block stands: its tensor, its first element's flat index, and the merge's seed.

    `is_vector`: the tensor is 1-D, and its elements are the rows of the block.
    """

    tensor: str
    start: int
    seed: int
    is_vector: bool = False


class Look(Protocol):
    """Run `see(inputs, block)` on every block, or on about `sample` of them; yield results in order.

    It may have methods that are faster: `products` yields the blocks' inner products as gram() adds them up;
    `masses` the sums of each input's magnitudes, and of those that are drawn at random with a `density` or lie in
    `bands` (rescale.ratios_of); `samples(inputs)` the bits of some of their magnitudes; and `split(ranges)`, block by
    block, how many bits of an input are beyond its range [low, high), and those inside, less `low`. Numbers of inputs
    beyond the last begin again with the first. Where there is one of the latter, there are all but `products`.
    """

    def __call__(self, see: Callable[[list[Tensor], Block], R], sample: int = 0) -> Iterator[R]: ...


@dataclass(frozen=True)
class Method:
    """A merge method and what its declaration says of it; `inputs` is (fewest, most)."""

    name: str
    combine: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    on_deltas: bool
    needs_base: bool
    base_is_input: bool
    optional_base: bool
    inputs: tuple[int, int]
    facts: Callable[..., Any] | None
    facts_nbytes: int
    sum_nbytes: int
    as_sum: Callable[..., WeightedSum] | None
    sum_if: Callable[..., bool]
    check: Callable[..., None] | None
    live: int
    wants: frozenset[str]
    sum_wants: frozenset[str]
    about: str

    def for_base(self, given: bool) -> Method:
        """The method as it works in a recipe with, or without, a base model."""
        return replace(self, on_deltas=True) if given and self.optional_base else self

    def __call__(self, inputs: list[Tensor], facts: Any, block: Block, parameters: Mapping[str, Any]) -> Tensor:
        extra = {"facts": facts, "block": block}
        wanted = {name: extra[name] for name in extra if name in self.wants}
        merged: Tensor = self.combine(inputs, **wanted, **{_python(name): value for name, value in parameters.items()})
        return merged

    def is_sum(self, parameters: Mapping[str, Any]) -> bool:
        """Whether what the method makes of its inputs is a weighted sum of them."""
        given = {_python(name): value for name, value in parameters.items()}
        return self.as_sum is not None and self.sum_if(**given)

    def weighted_sum(
        self, facts: Any, count: int, block: Block, compute: str, parameters: Mapping[str, Any]
    ) -> WeightedSum:
        """What the method makes of `count` inputs, of a method and parameters that are a sum (is_sum).

        `block`: the tensor's first.
        """
        assert self.as_sum is not None
        extra = {"facts": facts, "count": count, "block": block, "compute": compute}
        wanted = {name: extra[name] for name in extra if name in self.sum_wants}
        return self.as_sum(**wanted, **{_python(name): value for name, value in parameters.items()})

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Raises ValueError when the values of one tensor make no sense together."""
        if self.check is not None:
            self.check(**{_python(name): value for name, value in parameters.items()})

    def learn(self, look: Look, numel: int, parameters: Mapping[str, Any]) -> Any:
        """The facts that combining needs; None for a method that looks at nothing."""
        if self.facts is None:
            return None
        return self.facts(look, numel, **{_python(name): value for name, value in parameters.items()})


METHODS: Registry[Method] = Registry("merge method", __name__)


def method(
    *names: str,
    live: int,
    inputs: tuple[int, int] = (1, 1 << 16),
    base_is_input: bool = False,
    optional_base: bool = False,
    facts: Callable[..., Any] | None = None,
    facts_nbytes: int = 0,
    sum_nbytes: int = 0,
    as_sum: Callable[..., WeightedSum] | None = None,
    sum_if: Callable[..., bool] = lambda **_: True,
    check: Callable[..., None] | None = None,
    within: Mapping[str, Interval] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a merge method under one or more names.

    `base_is_input`: the base model is the first input (slerp). `optional_base`: where the recipe has a
    base model, the method works on task vectors (nuslerp). `facts_nbytes`: memory that learning
    the facts holds for each input; `sum_nbytes`: where kernels look at it. `as_sum`, given `facts`, `count` (of
    inputs), `block` (the tensor's first) or `compute` ("F32" or "F64") if it names them, and the parameters, tells
    the same as a weighted sum of the inputs, for parameters of which `sum_if` holds: such sums are computed in one
    pass, straight from the inputs' bytes. `check` raises ValueError for parameters that make no sense together, when
    the merge is planned. `within`: the interval in which a parameter must lie.
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
                facts=facts,
                facts_nbytes=facts_nbytes,
                sum_nbytes=sum_nbytes,
                as_sum=as_sum,
                sum_if=sum_if,
                check=check,
                live=live,
                wants=frozenset(arguments) & {"facts", "block"},
                sum_wants=frozenset(inspect.signature(as_sum).parameters if as_sum else ()),
                about=(inspect.getdoc(function) or "").split("\n")[0],
            )
            METHODS.add(name, entry)
        return function

    return register


def _python(name: str) -> str:
    return "lambda_" if name == "lambda" else name
