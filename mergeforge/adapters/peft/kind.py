"""PEFT methods other than LoRA: how their tensors change a weight. One file per method in kinds/ registers it.

    @adapter("HIRA", prefixes=("hira_",), fields="r hira_dropout ...")
    def hira(config, module):
        def prepare(factors):
            left, right = factors["hira_B"], factors["hira_A"]
            return lambda start, stop, base: (left[start:stop] @ right).mul_(base)
        return {"weight": Formula("HiRA", prepare, needs_base=True)}

The function takes adapter_config.json and the adapted module: its path, and the shapes of its tensors and of
its weight. It returns a formula for each tensor that it changes ("weight", "bias"), or raises ValueError with
the reason why it cannot. A formula is prepared once per tile and then computes W' - W for blocks of W's rows,
so no dense matrix of W's size is ever in memory. W is (out, in), or (out, rest) for a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from mergeforge.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
Shape = tuple[int, ...]
# (start, stop, W's rows [start, stop)) -> W' - W of these rows; W's rows are None unless the delta needs them.
Delta = Callable[[int, int, Any], "Tensor"]
Prepare = Callable[[Mapping[str, "Tensor"]], Delta]
# One pass over all of W: (first row, its rows from there), in order; rows may be overwritten after each step.
WeightPass = Callable[[], Iterator[tuple[int, "Tensor"]]]
# Factors and W -> further factors, for formulas that depend on all of W.
Statistic = Callable[[Mapping[str, "Tensor"], WeightPass], Mapping[str, "Tensor"]]

# Fields of adapter_config.json that every method has and that do not change what the tensors mean.
_COMMON_FIELDS = (
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights layers_pattern "
    "layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type"
)


@dataclass(frozen=True)
class AdaptedModule:
    """A module that an adapter changes.

    `shapes`: of the adapter's tensors for it, by role. `weight`: the shape of its weight, (out, in, ...).
    `dtype`: of its weight. `largest`: the largest (out, in) of all modules that the adapter changes. `order()`: the
    module's number in the order of the class that defines it, and the shapes of all modules' weights in that order;
    raises ValueError if that is unknown.
    """

    path: str
    shapes: Mapping[str, Shape]
    weight: Shape
    dtype: str = "F32"
    largest: tuple[int, int] = (0, 0)
    order: Callable[[], tuple[int, Sequence[Shape]]] = lambda: (0, ())

    @property
    def out_features(self) -> int:
        return self.weight[0]

    @property
    def in_features(self) -> int:
        return prod(self.weight[1:])

    def require(self, role: str, *shape: int | None) -> Shape:
        """Return the shape of a required tensor and check it; None stands for any size. Raises ValueError."""
        actual = self.shapes.get(role)
        if actual is None:
            raise ValueError(f"{self.path} has no {role}")
        if shape and not _fits(actual, shape):
            expected = ["any" if size is None else size for size in shape]
            weight = list(self.weight)
            raise ValueError(f"{self.path}: {role} is {list(actual)}, but its weight {weight} needs {expected}")
        return actual


def _fits(actual: Shape, expected: tuple[int | None, ...]) -> bool:
    return len(actual) == len(expected) and all(
        wanted_size in (None, size) for wanted_size, size in zip(expected, actual, strict=True)
    )


@dataclass(frozen=True)
class Formula:
    """W' - W of one tensor.

    `label`: its name in the plan. `scratch_nbytes`: memory for the preparation, in addition to the factors in
    float32. `scratch_blocks`: blocks alive at once. `row_group`: W's rows are needed in whole groups of this
    many. `details`: entries for the receipt, such as the scale. `statistic`: computes further factors from all of
    the weight before `prepare`, in at most `scratch_nbytes`. `reads_bias`: the factor "base_bias" is the base's bias of
    the module. `warning`: what cannot be known from the adapter.
    """

    label: str
    prepare: Prepare
    needs_base: bool = False
    scratch_nbytes: int = 0
    scratch_blocks: int = 2
    row_group: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)
    statistic: Statistic | None = None
    reads_bias: bool = False
    warning: str = ""


@dataclass(frozen=True)
class PeftMethod:
    """A PEFT method. `prefixes`: how the roles of its tensors begin; `fields`: the config fields it understands.

    `may_be_empty`: whether some of its tensors can have no elements.
    """

    name: str
    prefixes: tuple[str, ...]
    formulas: Callable[[Config, AdaptedModule], Mapping[str, Formula]]
    fields: frozenset[str]
    description: str
    may_be_empty: bool = False

    def parse_key(self, path: str) -> tuple[str, str] | None:
        """Split one of the method's keys into (module, role); the module is "" for tensors that all modules share."""
        names = path.split(".")
        first = next((at for at, name in enumerate(names) if name.startswith(self.prefixes)), None)
        if first is None:
            return None
        role = [name for name in names[first:] if name not in ("default", "weight")]
        return ".".join(names[:first]), ".".join(role)

    def check(self, config: Config) -> None:
        """Raises ValueError if the config sets a field that this version does not know."""
        for name in sorted(set(config) - self.fields):
            if config[name] not in (None, False, {}, [], "", 0):
                raise ValueError(unknown_field(name, config[name]))


def unknown_field(name: str, value: Any) -> str:
    return f"its config sets {name} = {value!r}, and this version does not know that field"


PEFT_METHODS: Registry[PeftMethod] = Registry("PEFT method", "mergeforge.adapters.peft.kinds")


def adapter(
    *names: str, prefixes: tuple[str, ...], fields: str, may_be_empty: bool = False
) -> Callable[[Callable[[Config, AdaptedModule], Mapping[str, Formula]]], Callable[..., Any]]:
    """Register a function as a PEFT method under its peft_types. `fields`: its config fields, separated by spaces."""

    def register(function: Callable[[Config, AdaptedModule], Mapping[str, Formula]]) -> Callable[..., Any]:
        known = frozenset(_COMMON_FIELDS.split()) | frozenset(fields.split())
        about = (function.__doc__ or "").partition("\n")[0].partition(" (peft/")[0].rstrip(".")
        for name in names:
            PEFT_METHODS.add(name, PeftMethod(name, prefixes, function, known, about, may_be_empty))
        return function

    return register


def low_rank(left: Tensor, right: Tensor) -> Delta:
    """left (out, r) @ right (r, in), block by block."""
    return lambda start, stop, base: left[start:stop] @ right


def pattern_value(config: Config, patterns: str, default: str, path: str) -> Any:
    """The first value of a `*_pattern` that matches the module's path or its end, else the default field's value.

    As get_pattern_key of peft/utils/other.py. Raises ValueError if the value is not a number.
    """
    values = matching_values(config.get(patterns), path)
    value = next(values, config.get(default))
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"its config sets {default} = {value!r} for {path}, which is not a number")
    return value


def matching_values(patterns: Any, path: str) -> Iterator[Any]:
    """The values of the patterns that match the module's path or its end, in the file's order. Raises ValueError."""
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"its config has {patterns!r} where a mapping of patterns to values is expected")
    try:
        return iter([value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)])
    except re.error as error:
        raise ValueError(f"its config has a pattern that is not a regular expression: {error}") from None
