"""Adapter kinds other than LoRA: what their tensors do to a weight. One file a kind; its presence registers it.

    @adapter("HIRA", prefixes=("hira_",), fields="r hira_dropout ...")
    def hira(config, module):
        def prepare(factors):
            left, right = factors["hira_B"], factors["hira_A"]
            return lambda start, stop, base: (left[start:stop] @ right).mul_(base)
        return {"weight": Formula("HiRA", prepare, needs_base=True)}

A kind's function gets adapter_config.json and a module: its path and the shapes of its tensors and of its
weight. It answers with a formula for each tensor that it changes ("weight", "bias"), or raises
ValueError with the reason why it cannot. A formula is prepared once for a tile and then gives W' - W for
blocks of W's rows, so no dense matrix of W's size is ever held. W is (out, in), convolutions (out, rest).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from mergeforge.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Delta = Callable[[int, int, Any], "Tensor"]  # rows [start, stop) given W's rows (None unless the formula needs them)
Prepare = Callable[[Mapping[str, "Tensor"]], Delta]

# Fields of adapter_config.json that every kind has and that change nothing about the tensors.
_COMMON = (
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights layers_pattern "
    "layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type"
)


@dataclass(frozen=True)
class Module:
    """A module that an adapter changes: its path, the shapes of its tensors by role, and its weight's (out, in, ...).

    `largest`: the largest (out, in) of all modules that the adapter changes.
    """

    path: str
    shapes: Mapping[str, Shape]
    weight: Shape
    largest: tuple[int, int] = (0, 0)

    @property
    def outside(self) -> int:
        return self.weight[0]

    @property
    def inside(self) -> int:
        return prod(self.weight[1:])

    def require(self, role: str, *shape: int | None) -> Shape:
        """The shape of a tensor that must be there; None stands for any size. Raises ValueError."""
        found = self.shapes.get(role)
        if found is None:
            raise ValueError(f"{self.path} lacks its {role}")
        if shape and not _fits(found, shape):
            wanted = [want if want is not None else "any" for want in shape]
            raise ValueError(f"{self.path}: {role} is {list(found)}, and its weight {list(self.weight)} wants {wanted}")
        return found


def _fits(found: Shape, wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(want in (None, size) for want, size in zip(wanted, found, strict=True))


@dataclass(frozen=True)
class Formula:
    """W' - W of one tensor.

    `about`: what it is called in a plan. `fixed`: bytes that preparing takes beside the factors in float32;
    `live`: blocks that exist at once. `reach`: W's rows are needed in whole groups of so many. `facts`: words
    for the receipt, such as the scale.
    """

    about: str
    prepare: Prepare
    needs_base: bool = False
    fixed: int = 0
    live: int = 2
    reach: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter. `prefixes`: how the roles of its tensors begin; `fields`: what it knows of its config."""

    name: str
    prefixes: tuple[str, ...]
    formulas: Callable[[Config, Module], Mapping[str, Formula]]
    fields: frozenset[str]
    about: str

    def role_of(self, path: str) -> tuple[str, str] | None:
        """(module, role) of a key that is the kind's own; the module is "" for tensors that all modules share."""
        pieces = path.split(".")
        at = next((at for at, piece in enumerate(pieces) if piece.startswith(self.prefixes)), None)
        if at is None:
            return None
        role = [piece for piece in pieces[at:] if piece not in ("default", "weight")]
        return ".".join(pieces[:at]), ".".join(role)

    def check(self, config: Config) -> None:
        """Raises ValueError for a field whose meaning is unknown."""
        for name in sorted(set(config) - self.fields):
            if config[name] not in (None, False, {}, [], "", 0):
                raise ValueError(f"its config sets {name} = {config[name]!r}, whose meaning is unknown here")


KINDS: Registry[Kind] = Registry("adapter kind", "mergeforge.adapters.peft.kinds")


def adapter(
    *names: str, prefixes: tuple[str, ...], fields: str
) -> Callable[[Callable[[Config, Module], Mapping[str, Formula]]], Callable[..., Any]]:
    """Register a function as an adapter kind under its PEFT types. `fields`: the config's, apart by spaces."""

    def register(function: Callable[[Config, Module], Mapping[str, Formula]]) -> Callable[..., Any]:
        known = frozenset(_COMMON.split()) | frozenset(fields.split())
        about = (function.__doc__ or "").partition("\n")[0].partition(" (peft/")[0].rstrip(".")
        for name in names:
            KINDS.add(name, Kind(name, prefixes, function, known, about))
        return function

    return register


def low_rank(left: Tensor, right: Tensor) -> Delta:
    """left (out, r) times right (r, in), block by block."""
    return lambda start, stop, base: left[start:stop] @ right


def by_pattern(config: Config, patterns: str, default: str, path: str) -> Any:
    """The first value of a `*_pattern` whose key matches the module's path or its end, else the default field's.

    peft/utils/other.py, get_pattern_key. Raises ValueError where that is no number.
    """
    found = matching(config.get(patterns), path)
    value = next(found, config.get(default))
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"its config says {default} = {value!r} for {path}, which is no number")
    return value


def matching(patterns: Any, path: str) -> Iterator[Any]:
    """The values of the patterns, in the file's order, that match the module's path or its end. Raises ValueError."""
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"its config has {patterns!r} where patterns and their values belong")
    try:
        return iter([value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)])
    except re.error as error:
        raise ValueError(f"its config has a pattern that is no regular expression: {error}") from None
