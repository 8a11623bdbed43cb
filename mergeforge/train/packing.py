"""Which rows share a sequence: best fit by falling length, so that little of a sequence stays empty.

Rows of one sequence do not see each other: each starts again at position 0, which the attention mask follows
(steps/batches.py). The packs depend on the lengths alone; their order in an epoch is the sampler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pack(lengths: Sequence[int] | Any, size: int) -> list[list[int]]:
    """Rows (by index) of each sequence of at most `size` tokens. Raises ValueError for a row longer than that.

    Best fit decreasing, in O(rows + size): rooms are kept by what is left in them.
    """
    import numpy as np

    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    rooms: list[list[int]] = [[] for _ in range(size + 1)]  # what is left -> packs
    best = _BestFitTree(size)
    packs: list[list[int]] = []
    for row in order:
        length = int(lengths[row])
        if length > size:
            raise ValueError(f"row {row} has {length} tokens, more than {size}")
        left = best.smallest_fit(length)
        if left is None:
            packs.append([row])
            at, left = len(packs) - 1, size
        else:
            at = rooms[left].pop()
            packs[at].append(row)
            if not rooms[left]:
                best.remove(left)
        if not rooms[left - length]:
            best.add(left - length)
        rooms[left - length].append(at)
    return [sorted(one) for one in packs]


class _BestFitTree:
    """A set of sizes 0..n that tells the smallest member of at least some size: a binary tree."""

    def __init__(self, size: int) -> None:
        self._leaves = 1 << size.bit_length()
        self._any = [False] * (2 * self._leaves)

    def add(self, at: int) -> None:
        at += self._leaves
        while at and not self._any[at]:
            self._any[at] = True
            at //= 2

    def remove(self, at: int) -> None:
        at += self._leaves
        self._any[at] = False
        while at > 1:
            at //= 2
            self._any[at] = self._any[2 * at] or self._any[2 * at + 1]

    def smallest_fit(self, low: int) -> int | None:
        at = low + self._leaves
        if self._any[at]:
            return low
        while at > 1 and (at % 2 or not self._any[at + 1]):
            at //= 2
        if at <= 1:
            return None
        at += 1
        while at < self._leaves:
            at = 2 * at if self._any[2 * at] else 2 * at + 1
        return at - self._leaves
