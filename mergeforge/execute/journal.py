"""Which tiles are safely on disk, and of which merge.

One line a record, each with its own CRC, so that a torn last line is seen and dropped. A tile is
recorded only after its bytes were synced; the journal is synced after that. The checksums of all
that was written of the tile stand with it: a resumed run checks them instead of believing the disk.
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

NAME = "journal.jsonl"


@dataclass(frozen=True)
class Commit:
    """The last step of a merge: files that move to their names, and those of the merge that it replaces."""

    moves: tuple[str, ...]
    removes: tuple[str, ...]


Checksums = Mapping[str, tuple[str, ...]]  # an outlet's key -> 32 hex digits for each strip


@dataclass(frozen=True)
class FinishedTile:
    """A finished tile: for each outlet, the checksums of its strips; and what was measured of its change."""

    tile: Tile
    checksums: Checksums
    change: tuple[float, ...] = ()


@dataclass(frozen=True)
class UploadedFile:
    """A finished file that was sent to a Hub repo, and is no longer here."""

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
        sent: Mapping[str, UploadedFile] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done = done
        self.commit = commit
        self.sent = dict(sent)
        self._by_tensor: dict[str, list[FinishedTile]] = {}
        for one in done.values():
            self._by_tensor.setdefault(one.tile.name, []).append(one)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise disk_error(error, str(path)) from error

    def is_finished(self, tile: Tile, strip_rows: Mapping[str, int]) -> Checksums | None:
        """The checksums of a tile's strips for each outlet; None unless all of them are finished.

        A run that was given another memory cut the tensor otherwise; the strips are the same.
        """
        found = {key: self._held(tile, key, rows) for key, rows in strip_rows.items()}
        return {key: sums for key, sums in found.items() if sums} if all(found.values()) else None

    def _held(self, tile: Tile, key: str, strip_rows: int) -> tuple[str, ...] | None:
        known = {
            one.tile.start + at * strip_rows: checksum
            for one in self._by_tensor.get(tile.name, ())
            for at, checksum in enumerate(one.checksums.get(key, ()))
        }
        starts = range(tile.start, tile.stop, strip_rows)
        return tuple(known[start] for start in starts) if all(start in known for start in starts) else None

    def measured(self, name: str) -> list[tuple[float, ...]]:
        """What was measured of a tensor, tile by tile: each block once, though it was cut otherwise before."""
        found: dict[int, tuple[float, ...]] = {}
        reached = 0
        for one in sorted(self._by_tensor.get(name, ()), key=lambda one: (one.tile.start, -one.tile.stop)):
            if one.tile.start >= reached and one.change:
                found[one.tile.start] = one.change
                reached = one.tile.stop
        return list(found.values())

    def record(self, finished: Iterable[FinishedTile]) -> None:
        """Append tiles whose bytes are synced, and sync the journal."""
        finished = list(finished)
        self._append([_record(one) for one in finished])
        for one in finished:
            self.done[one.tile] = one
            self._by_tensor.setdefault(one.tile.name, []).append(one)

    def record_sent(self, name: str, sent: UploadedFile) -> None:
        """Record that a file has arrived, before it is removed here."""
        self._append([{"sent": name, "repo": sent.repo, "sha256": sent.sha256, "size": sent.nbytes}])
        self.sent[name] = sent

    def start_commit(self, commit: Commit) -> None:
        """Record that everything is written and synced, and what is going to be moved and removed."""
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
    """A new journal, which names its merge in the first line."""
    path = folder / NAME
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
    """The journal of an interrupted run, cut back to its last whole line; None where there is none."""
    path = folder / NAME
    if not path.is_file():
        return None
    records, whole = _records(path.read_bytes())
    if not records or "merge" not in records[0]:
        return None
    os.truncate(path, whole)
    done, commit, sent = {}, None, {}
    for record in records:
        if "tile" in record:
            tile = Tile(*record["tile"])
            sums = {key: tuple(some) for key, some in record["sums"].items()}
            done[tile] = FinishedTile(tile, sums, tuple(record.get("measured", ())))
        elif "sent" in record:
            sent[record["sent"]] = UploadedFile(record["repo"], record["sha256"], record["size"])
        elif "commit" in record:
            commit = Commit(tuple(record["commit"]), tuple(record["removes"]))
    return Journal(path, records[0]["merge"], done, commit, sent)


def _record(done: FinishedTile) -> dict[str, object]:
    record: dict[str, object] = {"tile": [done.tile.name, done.tile.start, done.tile.stop], "sums": done.checksums}
    return record | ({"measured": done.change} if done.change else {})


def _line(record: dict[str, object]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _records(data: bytes) -> tuple[list[dict], int]:  # type: ignore[type-arg]  # any JSON
    """The records up to the first damaged line, and how many bytes they take."""
    records, whole = [], 0
    for line in data.splitlines(keepends=True):
        body = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != f"{zlib.crc32(body):08x} ".encode():
            break
        records.append(json.loads(body))
        whole += len(line)
    return records, whole
