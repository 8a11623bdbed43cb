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

from mergeforge.disk import disk_error, sync_folder, write_durably
from mergeforge.errors import OutputError, listing
from mergeforge.journal import NAME as JOURNAL
from mergeforge.journal import Journal, read_journal, start_journal
from mergeforge.planning import WORK, Plan, check_disk
from mergeforge.sinks.checkpoint import INDEX

RECEIPT = "mergeforge.json"
RECIPE = "mergeforge.yml"
LOCK = "lock"


class Workspace:
    """OUT/.mergeforge, locked, with the journal of this merge."""

    def __init__(self, plan: Plan, *, fresh: bool = False, overwrite: bool = False) -> None:
        self.plan = plan
        self.out = plan.out
        self.folder = plan.out / WORK
        self._refuse_strangers(overwrite)
        self._lock = self._locked()
        try:
            self.journal = self._journal(fresh)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def resumed(self) -> bool:
        return bool(self.journal.done) or self.journal.committing

    def close(self) -> None:
        self.journal.close()
        os.close(self._lock)

    def commit(self, side_files: dict[str, bytes | Path]) -> None:
        """Give every file its final name; `side_files` maps names to contents or files to copy."""
        if not self.journal.committing:
            for name, content in side_files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, content if isinstance(content, bytes) else content.read_bytes())
            self.journal.commit()
        names = [*self.plan.layout.files, *side_files]
        names.sort(key=lambda name: (name == RECEIPT, name == INDEX))  # these two last, in this order
        self._make_way(names)
        for name in names:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved before a crash
                os.replace(self.folder / name, self.out / name)
            if name in (RECEIPT, INDEX):
                sync_folder(self.out)
        sync_folder(self.out)
        self._remove()

    def _remove(self) -> None:
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        sync_folder(self.out)

    def _make_way(self, names: list[str]) -> None:
        """Remove the finished merge that is being replaced: its receipt first, then its files."""
        if not (self.folder / RECEIPT).exists():
            return  # the new receipt is already in place
        old = read_receipt(self.out)
        if old is None:
            return
        (self.out / RECEIPT).unlink()
        sync_folder(self.out)
        for name in [INDEX, *old.get("files", {})]:
            if not (self.folder / name).exists() and name in names:
                continue  # a new file, moved before a crash
            path = self.out / name
            if Path(name).name == name or path.parent.parent == self.out:
                path.unlink(missing_ok=True)
        sync_folder(self.out)

    def _refuse_strangers(self, overwrite: bool) -> None:
        """Do not write over what this merge did not make."""
        if (self.folder / JOURNAL).exists() or not self.out.exists():
            return
        if read_receipt(self.out) is not None:
            if not overwrite:
                hint = "--overwrite replaces it, --out DIR writes elsewhere"
                raise OutputError(f"{self.out} already holds a finished merge", hint=hint)
            return
        held = sorted(path.name for path in self.out.iterdir() if path.name != WORK)
        ours = {*self.plan.layout.files, *self.plan.side_files, INDEX, "config.json", "README.md", RECIPE}
        if clash := [name for name in held if name in ours or name.endswith((".safetensors", ".gguf"))]:
            text = f"{self.out} holds {listing(clash)}, which no merge of mergeforge wrote"
            raise OutputError(text, hint="write into a new folder with --out DIR")

    def _locked(self) -> int:
        """An exclusive lock on the folder. Raises OutputError when another run holds it."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                fd = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except OSError as error:
                refused = disk_error(error, str(self.folder))
                if refused is not error:
                    raise refused from error
                raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                os.close(fd)
                hint = "wait for it, or stop it; then run this again"
                raise OutputError(f"another run writes to {self.out} ({holder})", hint=hint) from None
            if _is_same(fd, self.folder / LOCK):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return fd
            os.close(fd)  # the run that held it has just finished and taken the folder away

    def _journal(self, fresh: bool) -> Journal:
        journal = read_journal(self.folder)
        if journal is not None and journal.fingerprint == self.plan.fingerprint and not fresh:
            if not journal.committing:
                check_disk(self.plan)
            return journal
        if journal is not None:
            journal.close()
            if journal.committing and not (self.folder / RECEIPT).exists():
                self._remove()  # all of it is in place: only the folder was left over
                raise OutputError(f"{self.out} already holds a finished merge", hint="--overwrite replaces it")
            if not fresh:
                hint = "--fresh throws its work away, --out DIR writes elsewhere"
                raise OutputError(f"an interrupted run of another merge lies in {self.folder}", hint=hint)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        check_disk(self.plan)
        return start_journal(self.folder, self.plan.fingerprint, self.plan.recipe.merge_method)


def read_receipt(out: Path) -> dict | None:  # type: ignore[type-arg]  # any JSON object
    """The receipt in a folder, or None."""
    try:
        value = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "tensors" in value else None


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
