"""The output folder while a merge is under way, and how it becomes a finished one.

Everything unfinished lies in OUT/.mergeforge, which one process at a time holds by a lock. When all
tensors are written and synced, the journal says so, and the files are renamed into OUT: weights
first, then what lies beside them, the index, and last the receipt. A crash at any point leaves
either no file of a name, or the whole file, and the next run goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

from mergeforge.errors import MergeforgeError, OutputError, listing
from mergeforge.execute.journal import NAME as JOURNAL
from mergeforge.execute.journal import Commit, Journal, read_journal, start_journal
from mergeforge.io.disk import disk_error, is_same, on_disk, sync_folder, write_at, write_durably
from mergeforge.planner import WORK, Plan, check_disk
from mergeforge.writers.safetensors import INDEX

RECEIPT = "mergeforge.json"
RECIPE = "mergeforge.yml"
CARD = "README.md"
LOCK = "lock"


class Workspace:
    """OUT/.mergeforge, locked, with the journal of this merge."""

    def __init__(self, plan: Plan, *, fresh: bool = False, overwrite: bool = False) -> None:
        self.plan = plan
        self.out = plan.out
        self.folder = plan.out / WORK
        if not self.folder.exists():
            self._refuse_strangers(overwrite)  # before anything is made there
        self._lock = self._locked()
        try:
            with on_disk(self.folder):
                self.journal = self._journal(fresh, overwrite)
        except BaseException:
            if not (self.folder / JOURNAL).exists():
                with contextlib.suppress(MergeforgeError, OSError):
                    self._remove()  # nothing was begun here, or a run was killed while it did just this
            os.close(self._lock)
            raise

    @property
    def resumed(self) -> bool:
        return bool(self.journal.done) or self.journal.commit is not None

    def close(self) -> None:
        self.journal.close()
        os.close(self._lock)

    def write_aux_files(self, side_files: dict[str, bytes | Path]) -> None:
        """Write what lies beside the weights, and record that all is ready to move.

        `side_files` maps names to contents or files to copy.
        """
        for name, content in side_files.items():
            path = self.folder / name
            if content == path:
                continue  # written there already
            with on_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, content if isinstance(content, bytes) else content.read_bytes())
        sync_folder(self.folder)
        moves = [*(() if self.plan.streams else self.plan.files), *side_files]
        moves.sort(key=lambda name: (name == RECEIPT, name == INDEX))  # these two last, in this order
        self.journal.start_commit(Commit(tuple(moves), self._replaced()))

    def commit(self) -> None:
        """Give every staged file its final name; goes on where a crash stopped it."""
        assert self.journal.commit is not None
        with on_disk(self.out):
            self._make_way(self.journal.commit)
            self._move(self.journal.commit)
            self._remove()

    def _move(self, commit: Commit) -> None:
        for name in commit.moves:
            staged, final = self.folder / name, self.out / name
            if name in (RECEIPT, INDEX):
                sync_folder(self.out)  # what they vouch for is in place before them
            if staged.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, final)
            elif not final.exists():
                raise OutputError(f"{staged} has vanished", hint="--fresh starts over")
            if final.parent != self.out:
                sync_folder(final.parent)
        sync_folder(self.out)

    def _remove(self) -> None:
        """Take the work folder away; what tells a later run the state goes last."""
        self._empty((JOURNAL, LOCK))
        (self.folder / JOURNAL).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run has just come in
            self.folder.rmdir()
        sync_folder(self.out)

    def _empty(self, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _replaced(self) -> tuple[str, ...]:
        """The files of the finished merge that this one replaces: its receipt first."""
        old = read_receipt(self.out)
        if old is None:
            return ()
        files = old.get("files")
        named = [name for name in files if _lies_inside(name)] if isinstance(files, dict) else []
        return tuple(dict.fromkeys([RECEIPT, INDEX, *named]))

    def _make_way(self, commit: Commit) -> None:
        """Remove the finished merge that is being replaced."""
        for name in commit.removes:
            if name not in commit.moves or (self.folder / name).exists():  # else it is the new one, already moved
                (self.out / name).unlink(missing_ok=True)
            if name == RECEIPT:
                sync_folder(self.out)
        sync_folder(self.out)

    def _take_back(self, commit: Commit) -> None:
        """Remove what an unfinished commit has moved, for a run that starts over."""
        self._make_way(commit)
        for name in commit.moves:
            if not (self.folder / name).exists():
                (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)

    def _refuse_strangers(self, overwrite: bool) -> None:
        """Do not write over what this merge did not make."""
        if not self.out.exists():
            return
        if read_receipt(self.out) is not None:
            if not overwrite:
                raise self._finished()
            return
        held = sorted(path.name for path in self.out.iterdir() if path.name != WORK)
        ours = {*self.plan.files, *self.plan.aux_files, INDEX, "config.json", CARD, RECIPE}
        if clash := [name for name in held if name in ours or name.endswith((".safetensors", ".gguf"))]:
            text = f"{self.out} holds {listing(clash)}, which no merge of mergeforge wrote"
            raise OutputError(text, hint="write into a new folder with --out DIR")

    def _finished(self) -> OutputError:
        hint = "--overwrite replaces it, --out DIR writes elsewhere"
        return OutputError(f"{self.out} already holds a finished merge", hint=hint)

    def _locked(self) -> int:
        """An exclusive lock on the folder. Raises OutputError when another run holds it."""
        while True:
            fd = self._opened_lock()
            if fd is None:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                os.close(fd)
                hint = "wait for it, or stop it; then run this again"
                raise OutputError(f"another run writes to {self.out} ({holder})", hint=hint) from None
            if is_same(fd, self.folder / LOCK):
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                try:
                    os.ftruncate(fd, 0)
                    write_at(fd, memoryview(holder.encode()), 0, str(self.folder / LOCK))
                except BaseException:
                    os.close(fd)
                    raise
                return fd
            os.close(fd)  # the run that held it has just finished and taken the folder away

    def _opened_lock(self) -> int | None:
        """The lock file; None where a run that has just finished takes its folder away."""
        if self.folder.is_symlink():
            raise OutputError(f"{self.folder} is a link", hint="remove it, or write elsewhere with --out DIR")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:
                return None
        except OSError as error:
            raise disk_error(error, str(self.folder)) from error

    def _journal(self, fresh: bool, overwrite: bool) -> Journal:
        """The journal to go on with, or a new one."""
        journal = read_journal(self.folder)
        if journal is None:
            (self.folder / JOURNAL).unlink(missing_ok=True)  # killed before its first line was whole
            self._refuse_strangers(overwrite)
            return self._started()
        try:
            same = journal.fingerprint == self.plan.fingerprint and not fresh
            if journal.commit is None or not self._has_moved():
                if not same and not fresh:
                    hint = "--fresh throws its work away, --out DIR writes elsewhere"
                    raise OutputError(f"an interrupted run of another merge lies in {self.folder}", hint=hint)
                if journal.commit is None and not overwrite and read_receipt(self.out) is not None:
                    raise self._finished()
            elif not same and not overwrite:
                raise self._finished()
            if same:
                if journal.commit is None:
                    check_disk(self.plan)
                return journal
            if journal.commit is not None and not self._has_moved():
                self._take_back(journal.commit)
        except BaseException:
            journal.close()
            raise
        journal.close()
        return self._started()

    def _started(self) -> Journal:
        self._empty((LOCK,))
        check_disk(self.plan)
        return start_journal(self.folder, self.plan.fingerprint, self.plan.recipe.method_name)

    def _has_moved(self) -> bool:
        """Whether a commit has moved everything: the receipt goes last."""
        return not (self.folder / RECEIPT).exists()


def read_receipt(out: Path) -> dict | None:  # type: ignore[type-arg]  # any JSON object
    """The receipt in a folder, or None."""
    try:
        value = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "tensors" in value else None


def _lies_inside(name: str) -> bool:
    """Whether a receipt's file name stays in its folder, or one folder below it."""
    parts = Path(name).parts
    return 0 < len(parts) < 3 and not {"/", "..", WORK} & set(parts)
