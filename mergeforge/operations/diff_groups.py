"""Differences of tensors that belong together: of one module in all layers, and of one layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mergeforge.operations.diff import TensorDifference

OUTSIDE = "outside of layers"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class DifferenceGroup:
    """Tensors of both checkpoints that were compared element by element; `name` is a pattern, or a layer's number."""

    name: str
    tensors: tuple[TensorDifference, ...]

    @property
    def different(self) -> int:
        return sum(tensor.change > 0 or math.isnan(tensor.relative) for tensor in self.tensors)

    @property
    def relative(self) -> float:
        """|A - B| / |A| over all tensors of the group."""
        change, norm = (math.hypot(*(getattr(tensor, key) for tensor in self.tensors)) for key in ("change", "norm"))
        return change / norm if norm else math.inf if change else 0.0

    @property
    def largest(self) -> float:
        return max((tensor.largest for tensor in self.tensors), default=0.0)


def by_module(differences: Iterable[TensorDifference]) -> list[DifferenceGroup]:
    """Tensors whose names differ only in numbers (layers, experts), the most changed group first."""
    return _groups(differences, pattern)


def by_layer(differences: Iterable[TensorDifference]) -> list[DifferenceGroup]:
    """Tensors of one layer, the most changed layer first."""
    return _groups(differences, _layer)


def pattern(name: str) -> str:
    """A tensor's name with * for each number."""
    return _NUMBER.sub("*", name)


def _layer(name: str) -> str:
    number = _NUMBER.search(name)
    return number[0] if number else OUTSIDE


def _groups(differences: Iterable[TensorDifference], key: Callable[[str], str]) -> list[DifferenceGroup]:
    members: dict[str, list[TensorDifference]] = {}
    for difference in differences:
        members.setdefault(key(difference.name), []).append(difference)
    groups = [DifferenceGroup(name, tuple(tensors)) for name, tensors in members.items()]
    return sorted((group for group in groups if group.different), key=lambda group: -group.relative)
