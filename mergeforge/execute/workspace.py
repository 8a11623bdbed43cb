"""Workspace: the output folder while a merge is running, and how it becomes a finished one.

Everything unfinished is in OUT/.mergeforge, which one process at a time holds by a lock. When all tensors are written
and synced, the journal records that, and the files are renamed into OUT: weights first, then the files next to them,
the index, and last the receipt. After a crash at any point, each file is either absent or complete, and the next run
resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

from mergeforge.core.checksums import file_sha256
from mergeforge.core.file_names import MODEL_CARD, RECEIPT, RECIPE
from mergeforge.errors import MergeforgeError, OutputError, format_list
from mergeforge.execute.journal import JOURNAL_NAME, Commit, Journal, read_journal, start_journal
from mergeforge.io.disk import disk_error, is_same_file, on_disk, sync_folder, write_at, write_durably
from mergeforge.planner import WORK, Plan, check_disk
from mergeforge.writers.safetensors import INDEX

LOCK = "lock"


class Workspace:
    """OUT/.mergeforge, locked, with the journal of this merge."""

    def __init__(self, plan: Plan, *, fresh: bool = False, overwrite: bool = False) -> None:
        self.plan = plan
        self.out = plan.out
        self.folder = plan.out / WORK
        if not self.folder.exists():
            self._check_foreign_files(overwrite)  # before anything is created there
        self._lock = self._acquire_lock()
        try:
            with on_disk(self.folder):
                self.journal = self._open_journal(fresh, overwrite)
        except BaseException:
            if not (self.folder / JOURNAL_NAME).exists():
                with contextlib.suppress(MergeforgeError, OSError):
                    self._remove()  # nothing was started here, or a run was killed during this very step
            os.close(self._lock)
            raise

    @property
    def replaces_edited_card(self) -> bool:
        """Whether the finished merge in OUT, which this one replaces, has a model card that was edited."""
        card = self.out / MODEL_CARD
        files = (read_receipt(self.out) or {}).get("files")
        facts = files.get(MODEL_CARD) if isinstance(files, dict) else None
        recorded = facts.get("sha256") if isinstance(facts, dict) else None
        return recorded is not None and card.is_file() and file_sha256(card) != recorded

    @property
    def resumed(self) -> bool:
        return bool(self.journal.done) or self.journal.commit is not None

    def close(self) -> None:
        self.journal.close()
        os.close(self._lock)

    def write_aux_files(self, aux_files: dict[str, bytes | Path]) -> None:
        """Write the files next to the weights, and record that everything is ready to be moved.

        `aux_files` maps names to contents or to files to copy.
        """
        for name, content in aux_files.items():
            path = self.folder / name
            if content == path:
                continue  # already written there
            with on_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, content if isinstance(content, bytes) else content.read_bytes())
        sync_folder(self.folder)
        moves = [*(() if self.plan.streams else self.plan.files), *aux_files]
        moves.sort(key=lambda name: (name == RECEIPT, name == INDEX))  # these two last, in this order
        self.journal.start_commit(Commit(tuple(moves), self._replaced()))

    def commit(self) -> None:
        """Give every staged file its final name; resumes where a crash stopped it."""
        assert self.journal.commit is not None
        with on_disk(self.out):
            self._remove_replaced(self.journal.commit)
            self._move(self.journal.commit)
            self._remove()

    def _move(self, commit: Commit) -> None:
        for name in commit.moves:
            staged, final = self.folder / name, self.out / name
            if name in (RECEIPT, INDEX):
                sync_folder(self.out)  # the files that they list are in place before them
            if staged.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, final)
            elif not final.exists():
                raise OutputError(f"{staged} has vanished", hint="--fresh starts over")
            if final.parent != self.out:
                sync_folder(final.parent)
        sync_folder(self.out)

    def _remove(self) -> None:
        """Remove the work folder; the files that tell a later run the state go last."""
        self._empty((JOURNAL_NAME, LOCK))
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run has just entered
            self.folder.rmdir()
        sync_folder(self.out)

    def _empty(self, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _replaced(self) -> tuple[str, ...]:
        """The files of the finished merge that this one replaces, its receipt first."""
        old = read_receipt(self.out)
        if old is None:
            return ()
        files = old.get("files")
        names = [name for name in files if _is_safe_name(name)] if isinstance(files, dict) else []
        return tuple(dict.fromkeys([RECEIPT, INDEX, *names]))

    def _remove_replaced(self, commit: Commit) -> None:
        """Remove the finished merge that is being replaced."""
        for name in commit.removes:
            if name not in commit.moves or (self.folder / name).exists():  # otherwise it is the new file, already moved
                (self.out / name).unlink(missing_ok=True)
            if name == RECEIPT:
                sync_folder(self.out)
        sync_folder(self.out)

    def _undo_commit(self, commit: Commit) -> None:
        """Remove what an unfinished commit has moved, for a run that starts over."""
        self._remove_replaced(commit)
        for name in commit.moves:
            if not (self.folder / name).exists():
                (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)

    def _check_foreign_files(self, overwrite: bool) -> None:
        """Refuse to overwrite what this merge did not write. Raises OutputError."""
        if not self.out.exists():
            return
        if read_receipt(self.out) is not None:
            if not overwrite:
                raise self._already_finished()
            return
        names = sorted(path.name for path in self.out.iterdir() if path.name != WORK)
        own_names = {*self.plan.files, *self.plan.aux_files, INDEX, "config.json", MODEL_CARD, RECIPE}
        if clash := [name for name in names if name in own_names or name.endswith((".safetensors", ".gguf"))]:
            text = f"{self.out} holds {format_list(clash)}, which no merge of mergeforge wrote"
            raise OutputError(text, hint="write to a new folder with --out DIR")

    def _already_finished(self) -> OutputError:
        hint = "--overwrite replaces it, --out DIR writes elsewhere"
        return OutputError(f"{self.out} already holds a finished merge", hint=hint)

    def _acquire_lock(self) -> int:
        """Lock the folder exclusively. Raises OutputError if another run holds the lock."""
        while True:
            fd = self._open_lock_file()
            if fd is None:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                os.close(fd)
                hint = "wait for it or stop it, then run this command again"
                raise OutputError(f"another run writes to {self.out} ({holder})", hint=hint) from None
            if is_same_file(fd, self.folder / LOCK):
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                try:
                    os.ftruncate(fd, 0)
                    write_at(fd, memoryview(holder.encode()), 0, str(self.folder / LOCK))
                except BaseException:
                    os.close(fd)
                    raise
                return fd
            os.close(fd)  # the run that held it has just finished and removed the folder

    def _open_lock_file(self) -> int | None:
        """Open the lock file; None if a run that has just finished is removing its folder."""
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

    def _open_journal(self, fresh: bool, overwrite: bool) -> Journal:
        """The journal of the interrupted run to resume, or a new one."""
        journal = read_journal(self.folder)
        if journal is None:
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)  # killed before its first line was complete
            self._check_foreign_files(overwrite)
            return self._start_journal()
        try:
            resume = journal.fingerprint == self.plan.fingerprint and not fresh
            if journal.commit is None or not self._is_committed():
                if not resume and not fresh:
                    hint = "--fresh discards its work, --out DIR writes elsewhere"
                    raise OutputError(f"an interrupted run of another merge is in {self.folder}", hint=hint)
                if journal.commit is None and not overwrite and read_receipt(self.out) is not None:
                    raise self._already_finished()
            elif not resume and not overwrite:
                raise self._already_finished()
            if resume:
                if journal.commit is None:
                    check_disk(self.plan)
                return journal
            if journal.commit is not None and not self._is_committed():
                self._undo_commit(journal.commit)
        except BaseException:
            journal.close()
            raise
        journal.close()
        return self._start_journal()

    def _start_journal(self) -> Journal:
        self._empty((LOCK,))
        check_disk(self.plan)
        return start_journal(self.folder, self.plan.fingerprint, self.plan.recipe.method_name)

    def _is_committed(self) -> bool:
        """Whether a commit has moved everything: the receipt is moved last."""
        return not (self.folder / RECEIPT).exists()


def read_receipt(out: Path) -> dict | None:  # type: ignore[type-arg]  # any JSON object
    """The receipt in a folder, or None."""
    try:
        value = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "tensors" in value else None


def _is_safe_name(name: str) -> bool:
    """Whether a file name from a receipt stays in its folder."""
    parts = Path(name).parts
    return bool(parts) and not {"/", "..", WORK} & set(parts)
