"""The journal: which strips are finished, whatever tiles they were written in."""

from __future__ import annotations

from pathlib import Path

from mergeforge.core.tensor_info import Tile
from mergeforge.execute.journal import FinishedTile, read_journal, start_journal


def test_strips_count_whatever_tiles_they_came_in(tmp_path: Path) -> None:
    journal = start_journal(tmp_path, "fingerprint", "fold")
    journal.record(
        [FinishedTile(Tile("w", 0, 20), {"f": ("aa", "bb")}), FinishedTile(Tile("w", 20, 25), {"f": ("cc",)})]
    )
    journal.close()
    again = read_journal(tmp_path)
    assert again is not None
    assert again.is_finished(Tile("w", 0, 25), {"f": 10}) == {"f": ("aa", "bb", "cc")}
    assert again.is_finished(Tile("w", 10, 25), {"f": 10}) == {"f": ("bb", "cc")}
    assert again.is_finished(Tile("w", 20, 30), {"f": 5}) is None
    assert again.is_finished(Tile("w", 0, 25), {"f": 10, "g": 10}) is None
    assert again.is_finished(Tile("v", 0, 10), {"f": 10}) is None
    again.close()
