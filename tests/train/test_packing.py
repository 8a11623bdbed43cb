"""Packs hold every row once and waste little space."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeforge.train.packing import pack


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths: list[int], size: int) -> None:
    packs = pack(lengths, size)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= size for rows in packs)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_at_most_one_pack_is_half_empty(lengths: list[int]) -> None:
    assert sum(2 * sum(lengths[row] for row in rows) <= 64 for rows in pack(lengths, 64)) <= 1


def test_an_example_worked_by_hand() -> None:
    assert pack([5, 4, 3, 2, 1], 8) == [[0, 2], [1, 3, 4]]


def test_a_row_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        pack([3, 9], 8)
