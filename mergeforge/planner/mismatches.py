"""What contradicts between the inputs of a merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mismatches:
    """Contradictions in words. decisive: they make the result meaningless. doubtful: they are probably not meant."""

    decisive: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()

    def __add__(self, other: Mismatches) -> Mismatches:
        return Mismatches(self.decisive + other.decisive, self.doubtful + other.doubtful)


def all_mismatches(parts: Iterable[Mismatches]) -> Mismatches:
    return sum(parts, Mismatches())
