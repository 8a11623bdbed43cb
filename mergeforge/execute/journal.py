"""Journal: which tiles are safely on disk, and of which merge.

One record per line, each with its own CRC, so that a torn last line is detected and dropped. A tile is recorded only
after its bytes are synced; the journal is synced after that. The checksums of everything that was written of the tile
are part of its record: a resumed run checks them instead of trusting the disk.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mergeforge.core.tensor_info import Tile
from mergeforge.io.disk import disk_error, sync_folder

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Commit:
    """The last step of a merge: files to move to their final names, and files of the replaced merge to remove."""

    moves: tuple[str, ...]
    removes: tuple[str, ...]


Checksums = Mapping[str, tuple[str, ...]]  # an encoder's key -> 32 hex digits per chunk


@dataclass(frozen=True)
class FinishedTile:
    """A finished tile: the checksums of its chunks per encoder, and the statistics of its change (ChangeStats)."""

    tile: Tile
    checksums: Checksums
    change: tuple[float, ...] = ()


@dataclass(frozen=True)
class UploadedFile:
    """A finished file that was uploaded to a Hub repo and removed locally."""

    repo: str
    sha256: str
    nbytes: int


class Journal:
    """The journal of one output folder, open for appending."""

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        done: dict[Tile, FinishedTile],
        commit: Commit | None,
        uploaded: Mapping[str, UploadedFile] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done = done
        self.commit = commit
        self.uploaded = dict(uploaded)
        self._by_tensor: dict[str, list[FinishedTile]] = {}
        for finished in done.values():
            self._by_tensor.setdefault(finished.tile.name, []).append(finished)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise disk_error(error, str(path)) from error

    def is_finished(self, tile: Tile, chunk_rows: Mapping[str, int]) -> Checksums | None:
        """The checksums of a tile's chunks per encoder; None unless all chunks are finished.

        A run with another memory budget splits the tensor into other tiles, but the chunks are the same.
        """
        checksums = {key: self._chunk_checksums(tile, key, rows) for key, rows in chunk_rows.items()}
        return {key: sums for key, sums in checksums.items() if sums} if all(checksums.values()) else None

    def _chunk_checksums(self, tile: Tile, key: str, chunk_rows: int) -> tuple[str, ...] | None:
        by_start = {
            finished.tile.start + index * chunk_rows: checksum
            for finished in self._by_tensor.get(tile.name, ())
            for index, checksum in enumerate(finished.checksums.get(key, ()))
        }
        starts = range(tile.start, tile.stop, chunk_rows)
        return tuple(by_start[start] for start in starts) if all(start in by_start for start in starts) else None

    def change_stats(self, name: str) -> list[tuple[float, ...]]:
        """The change statistics of a tensor's tiles. Each block counts once, even if earlier runs used other tiles."""
        changes: dict[int, tuple[float, ...]] = {}
        covered = 0
        tiles = self._by_tensor.get(name, ())
        for finished in sorted(tiles, key=lambda finished: (finished.tile.start, -finished.tile.stop)):
            if finished.tile.start >= covered and finished.change:
                changes[finished.tile.start] = finished.change
                covered = finished.tile.stop
        return list(changes.values())

    def record(self, tiles: Iterable[FinishedTile]) -> None:
        """Append tiles whose bytes are synced, and sync the journal."""
        tiles = list(tiles)
        self._append([_record(finished) for finished in tiles])
        for finished in tiles:
            self.done[finished.tile] = finished
            self._by_tensor.setdefault(finished.tile.name, []).append(finished)

    def record_upload(self, name: str, file: UploadedFile) -> None:
        """Record that a file has arrived on the Hub, before it is removed locally."""
        self._append([{"sent": name, "repo": file.repo, "sha256": file.sha256, "size": file.nbytes}])
        self.uploaded[name] = file

    def start_commit(self, commit: Commit) -> None:
        """Record that everything is written and synced, and what is about to be moved and removed."""
        self._append([{"commit": commit.moves, "removes": commit.removes}])
        self.commit = commit

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, records: list[dict[str, object]]) -> None:
        text = b"".join(_line(record) for record in records)
        try:
            while text:
                text = text[os.write(self._fd, text) :]
            os.fsync(self._fd)
        except OSError as error:
            raise disk_error(error, str(self.path)) from error


def start_journal(folder: Path, fingerprint: str, summary: str) -> Journal:
    """Create a new journal, which names its merge in the first line."""
    path = folder / JOURNAL_NAME
    path.unlink(missing_ok=True)
    journal = Journal(path, fingerprint, {}, None)
    try:
        journal._append([{"merge": fingerprint, "summary": summary}])
        sync_folder(folder)
    except BaseException:
        journal.close()
        raise
    return journal


def read_journal(folder: Path) -> Journal | None:
    """Open the journal of an interrupted run, truncated to its last complete line; None if there is none."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return None
    records, nbytes = _records(path.read_bytes())
    if not records or "merge" not in records[0]:
        return None
    os.truncate(path, nbytes)
    done, commit, uploaded = {}, None, {}
    for record in records:
        if "tile" in record:
            tile = Tile(*record["tile"])
            checksums = {key: tuple(sums) for key, sums in record["sums"].items()}
            done[tile] = FinishedTile(tile, checksums, tuple(record.get("measured", ())))
        elif "sent" in record:
            uploaded[record["sent"]] = UploadedFile(record["repo"], record["sha256"], record["size"])
        elif "commit" in record:
            commit = Commit(tuple(record["commit"]), tuple(record["removes"]))
    return Journal(path, records[0]["merge"], done, commit, uploaded)


def read_records(folder: Path) -> list[dict]:  # type: ignore[type-arg]  # any JSON
    """The journal's records up to the first damaged line; none if there is no journal."""
    try:
        return _records((folder / JOURNAL_NAME).read_bytes())[0]
    except OSError:
        return []


def _record(finished: FinishedTile) -> dict[str, object]:
    tile = finished.tile
    record: dict[str, object] = {"tile": [tile.name, tile.start, tile.stop], "sums": finished.checksums}
    return record | ({"measured": finished.change} if finished.change else {})


def _line(record: dict[str, object]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _records(data: bytes) -> tuple[list[dict], int]:  # type: ignore[type-arg]  # any JSON
    """The records up to the first damaged line, and their size in bytes."""
    records, nbytes = [], 0
    for line in data.splitlines(keepends=True):
        body = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != f"{zlib.crc32(body):08x} ".encode():
            break
        records.append(json.loads(body))
        nbytes += len(line)
    return records, nbytes
