"""The journal: which chunks are finished, whatever tiles they were written in."""

from __future__ import annotations

from pathlib import Path

from mergeforge.core.tensor_info import Tile
from mergeforge.execute.journal import FinishedTile, read_journal, start_journal


def test_finds_finished_chunks_across_tiles(tmp_path: Path) -> None:
    journal = start_journal(tmp_path, "fingerprint", "fold")
    journal.record(
        [FinishedTile(Tile("w", 0, 20), {"f": ("aa", "bb")}), FinishedTile(Tile("w", 20, 25), {"f": ("cc",)})]
    )
    journal.close()
    resumed = read_journal(tmp_path)
    assert resumed is not None
    assert resumed.is_finished(Tile("w", 0, 25), {"f": 10}) == {"f": ("aa", "bb", "cc")}
    assert resumed.is_finished(Tile("w", 10, 25), {"f": 10}) == {"f": ("bb", "cc")}
    assert resumed.is_finished(Tile("w", 20, 30), {"f": 5}) is None
    assert resumed.is_finished(Tile("w", 0, 25), {"f": 10, "g": 10}) is None
    assert resumed.is_finished(Tile("v", 0, 10), {"f": 10}) is None
    resumed.close()
