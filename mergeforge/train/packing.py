"""Which rows share a sequence: best fit decreasing, which leaves little of a sequence empty.

Rows of one sequence do not attend to each other: each starts again at position 0, and the attention mask follows from
the positions (loop/collate.py). Packs depend on the lengths alone; the sampler sets their order in an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pack(lengths: Sequence[int] | Any, size: int) -> list[list[int]]:
    """The row indices of each sequence of at most `size` tokens. Raises ValueError for a row longer than that.

    Best fit decreasing, in O(rows + size): packs are grouped by their free space.
    """
    import numpy as np

    longest_first = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    packs_by_space: list[list[int]] = [[] for _ in range(size + 1)]  # free space -> pack indices
    spaces = _BestFitTree(size)
    packs: list[list[int]] = []
    for row in longest_first:
        length = int(lengths[row])
        if length > size:
            raise ValueError(f"row {row} has {length} tokens, more than {size}")
        space = spaces.smallest_fit(length)
        if space is None:
            packs.append([row])
            index, space = len(packs) - 1, size
        else:
            index = packs_by_space[space].pop()
            packs[index].append(row)
            if not packs_by_space[space]:
                spaces.remove(space)
        if not packs_by_space[space - length]:
            spaces.add(space - length)
        packs_by_space[space - length].append(index)
    return [sorted(rows) for rows in packs]


def pack_rows(lengths: Sequence[int] | Any, size: int, *, answers: int = 1) -> list[list[int]]:
    """`pack` for rows of `answers` consecutive examples, which share a sequence. The indices are those of examples."""
    import numpy as np

    rows = pack(np.asarray(lengths).reshape(-1, answers).sum(1), size)
    return [[row * answers + answer for row in sequence for answer in range(answers)] for sequence in rows]


class _BestFitTree:
    """A set of sizes 0..n that finds its smallest member of at least a given size: a binary tree in a list."""

    def __init__(self, size: int) -> None:
        self._leaves = 1 << size.bit_length()
        self._has_member = [False] * (2 * self._leaves)

    def add(self, size: int) -> None:
        node = size + self._leaves
        while node and not self._has_member[node]:
            self._has_member[node] = True
            node //= 2

    def remove(self, size: int) -> None:
        node = size + self._leaves
        self._has_member[node] = False
        while node > 1:
            node //= 2
            self._has_member[node] = self._has_member[2 * node] or self._has_member[2 * node + 1]

    def smallest_fit(self, size: int) -> int | None:
        """The smallest member of at least `size`; None where there is none."""
        node = size + self._leaves
        if self._has_member[node]:
            return size
        while node > 1 and (node % 2 or not self._has_member[node + 1]):
            node //= 2
        if node <= 1:
            return None
        node += 1
        while node < self._leaves:
            node = 2 * node if self._has_member[2 * node] else 2 * node + 1
        return node - self._leaves
