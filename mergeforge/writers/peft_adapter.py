"""A PEFT adapter folder, written so that it is whole or absent.

Ranks may follow from the data, so the header of adapter_model.safetensors is known only at the end:
tensors first go to a spool file in the hidden folder that later becomes OUT, and are copied behind
the header in safetensors' own order. So the bytes do not depend on which thread was first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.tensor_info import TensorInfo, dtype_name
from mergeforge.errors import MergeforgeError, OutputError, format_list
from mergeforge.io.disk import (
    DiskFile,
    InputFile,
    WriteBehind,
    disk_error,
    is_same_file,
    on_disk,
    sync_folder,
    write_at,
    write_durably,
)
from mergeforge.io.file_layout import OutputFiles
from mergeforge.writers.safetensors import SINGLE_FILE, lay_out

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SPOOL = "spool"
PIECE = 8 << 20  # bytes copied at a time


@dataclass(frozen=True)
class SpooledTensor:
    """A tensor of the adapter and where its bytes lie now."""

    info: TensorInfo
    file: InputFile
    offset: int


class Spool:
    """A file that takes tensors as they come, from any thread."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        self._lock = threading.Lock()
        self._held: dict[str, tuple[TensorInfo, int]] = {}
        self._size = 0
        self._behind = WriteBehind()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise disk_error(error, str(self.path)) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor under its key in the adapter. Raises BudgetError when the disk is full."""
        import torch

        info = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
        with self._lock:
            write_at(self._fd, data, self._size, str(self.path))
            self._behind.written(self._fd, self._size, len(data))
            self._held[name] = (info, self._size)
            self._size += len(data)

    def tensors(self) -> list[SpooledTensor]:
        """What it holds, by name."""
        file = DiskFile(self.path)
        return [SpooledTensor(info, file, offset) for _, (info, offset) in sorted(self._held.items())]

    def close(self) -> None:
        os.close(self._fd)


def write_peft_adapter(folder: Path, parts: Sequence[SpooledTensor], config: Mapping[str, Any], card: str) -> None:
    """Write adapter_model.safetensors, adapter_config.json and README.md; durable on return."""
    layout = lay_out([part.info for part in parts], 1 << 62)
    files = OutputFiles(folder, {ADAPTER_WEIGHTS: layout.files[SINGLE_FILE]})
    behind = WriteBehind()
    try:
        files.open()
        for part in sorted(parts, key=lambda part: layout.extents[part.info.name].offset):
            _copy(part, files, layout.extents[part.info.name].offset, behind)
            part.file.check_unchanged()
        files.sync()
    finally:
        files.close()
    write_durably(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_durably(folder / MODEL_CARD, card.encode())


def _copy(part: SpooledTensor, files: OutputFiles, offset: int, behind: WriteBehind) -> None:
    import numpy as np

    piece = np.empty(min(PIECE, part.info.nbytes), np.uint8)
    for done in range(0, part.info.nbytes, PIECE):
        some = piece[: min(PIECE, part.info.nbytes - done)]
        part.file.read_into(some.data, part.offset + done)
        files.write(ADAPTER_WEIGHTS, some, offset + done, behind)


def renamed_tensor(part: SpooledTensor, name: str) -> SpooledTensor:
    """The same bytes under another name."""
    return replace(part, info=part.info.renamed(name))


@contextmanager
def staged_folder(out: Path, written: Iterable[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside OUT that becomes OUT when all went well; one run at a time may hold it.

    `written`: the names that it will hold. Only a folder that holds nothing else is replaced, with
    `overwrite`. Raises OutputError.
    """
    out = out.absolute()
    work, old = out.with_name(f".{out.name}.mergeforge"), out.with_name(f".{out.name}.mergeforge-old")
    with _locked(out):
        try:
            with on_disk(out):
                if old.exists() and not out.exists():
                    os.rename(old, out)  # a run was killed between its two renames
                check_adapter_folder(out, written, overwrite=overwrite)
                shutil.rmtree(work, ignore_errors=True)  # what a killed run left
                work.mkdir()
            yield work
            with on_disk(out):
                (work / SPOOL).unlink(missing_ok=True)
                sync_folder(work)
                _put(work, out, old)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_adapter_folder(out: Path, written: Iterable[str], *, overwrite: bool = False) -> None:
    """Raises OutputError where OUT cannot become a folder that holds `written`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file", hint="name a folder to write into")
    held = sorted(path.name for path in out.iterdir())
    if strangers := [name for name in held if name not in set(written)]:
        hint = "write into a new folder with --out DIR"
        raise OutputError(f"{out} holds {format_list(strangers)}, which is no part of such an adapter", hint=hint)
    if held and not overwrite:
        if _lock_of(out.absolute()).exists():  # of a run that was killed when all was done
            with suppress(MergeforgeError), _locked(out.absolute()):
                pass
        raise OutputError(f"{out} already holds an adapter", hint="--overwrite replaces it, --out DIR writes elsewhere")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold OUT for this run. The lock lies beside it, because the folder that becomes OUT must not hold one."""
    path = _lock_of(out)
    fd = _lock(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.mergeforge-lock")


def _lock(path: Path, out: Path) -> int:
    while True:
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            hint = "wait for it, or stop it; then run this again"
            raise OutputError(f"another run writes to {out}", hint=hint) from None
        if is_same_file(fd, path):
            return fd
        os.close(fd)  # the run that held it has just taken it away


def _put(work: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        os.rename(out, old)
    os.rename(work, out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
