"""A PEFT adapter folder, written so that it is either complete or absent.

Ranks may depend on the data, so the header of adapter_model.safetensors is known only at the end. Tensors are first
written to a spool file in a hidden folder that later becomes OUT, and then copied behind the header in safetensors'
order. So the bytes do not depend on the order in which threads finish.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
COPY_NBYTES = 8 << 20  # copied at a time


@dataclass(frozen=True)
class SpooledTensor:
    """A tensor of the adapter, and where its bytes are now."""

    info: TensorInfo
    file: InputFile
    offset: int


class Spool:
    """A file to which any thread can append tensors."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        self._lock = threading.Lock()
        self._tensors: dict[str, tuple[TensorInfo, int]] = {}
        self._size = 0
        self._behind = WriteBehind()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise disk_error(error, str(self.path)) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor under its key in the adapter. Raises BudgetError if the disk is full."""
        import torch

        info = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
        with self._lock:
            write_at(self._fd, data, self._size, str(self.path))
            self._behind.written(self._fd, self._size, len(data))
            self._tensors[name] = (info, self._size)
            self._size += len(data)

    def tensors(self) -> list[SpooledTensor]:
        """The tensors, sorted by name."""
        file = DiskFile(self.path)
        return [SpooledTensor(info, file, offset) for _, (info, offset) in sorted(self._tensors.items())]

    def close(self) -> None:
        os.close(self._fd)


def write_peft_adapter(
    folder: Path, tensors: Sequence[SpooledTensor], config: Mapping[str, Any], model_card: str
) -> None:
    """Write adapter_model.safetensors, adapter_config.json and README.md, all synced to disk."""
    layout = lay_out([tensor.info for tensor in tensors], 1 << 62)
    files = OutputFiles(folder, {ADAPTER_WEIGHTS: layout.files[SINGLE_FILE]})
    behind = WriteBehind()
    try:
        files.open()
        for tensor in sorted(tensors, key=lambda tensor: layout.extents[tensor.info.name].offset):
            _copy(tensor, files, layout.extents[tensor.info.name].offset, behind)
            tensor.file.check_unchanged()
        files.sync()
    finally:
        files.close()
    write_durably(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_durably(folder / MODEL_CARD, model_card.encode())


def _copy(tensor: SpooledTensor, files: OutputFiles, offset: int, behind: WriteBehind) -> None:
    import numpy as np

    buffer = np.empty(min(COPY_NBYTES, tensor.info.nbytes), np.uint8)
    for done in range(0, tensor.info.nbytes, COPY_NBYTES):
        chunk = buffer[: min(COPY_NBYTES, tensor.info.nbytes - done)]
        tensor.file.read_into(chunk.data, tensor.offset + done)
        files.write(ADAPTER_WEIGHTS, chunk, offset + done, behind)


@contextmanager
def staged_folder(out: Path, written: Iterable[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder next to OUT that is renamed to OUT on success; only one run at a time may use it.

    `written`: the names of the files that it will contain. With `overwrite`, a folder that contains nothing else is
    replaced. Raises OutputError.
    """
    out = out.absolute()
    work, old = out.with_name(f".{out.name}.mergeforge"), out.with_name(f".{out.name}.mergeforge-old")
    with _exclusive_lock(out):
        try:
            with on_disk(out):
                if old.exists() and not out.exists():
                    os.rename(old, out)  # a run was killed between the two renames
                check_adapter_folder(out, written, overwrite=overwrite)
                shutil.rmtree(work, ignore_errors=True)  # left by a killed run
                work.mkdir()
            yield work
            with on_disk(out):
                (work / SPOOL).unlink(missing_ok=True)
                sync_folder(work)
                _move_into_place(work, out, old)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_adapter_folder(out: Path, written: Iterable[str], *, overwrite: bool = False) -> None:
    """Raises OutputError if OUT cannot become a folder with the files `written`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file", hint="name a folder with --out DIR")
    names = sorted(path.name for path in out.iterdir())
    if foreign := [name for name in names if name not in set(written)]:
        hint = "write to a new folder with --out DIR"
        raise OutputError(f"{out} contains {format_list(foreign)}, which is not a part of the adapter", hint=hint)
    if names and not overwrite:
        if _lock_path(out.absolute()).exists():  # left by a run that was killed after it had finished
            with suppress(MergeforgeError), _exclusive_lock(out.absolute()):
                pass
        raise OutputError(
            f"{out} already holds an adapter", hint="--overwrite replaces it, --out DIR writes to another folder"
        )


@contextmanager
def _exclusive_lock(out: Path) -> Iterator[None]:
    """Lock OUT for this run. The lock file is next to OUT, because the folder that becomes OUT must not contain one."""
    path = _lock_path(out)
    fd = _acquire_lock(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _lock_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.mergeforge-lock")


def _acquire_lock(path: Path, out: Path) -> int:
    while True:
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            hint = "wait until it finishes, or stop it; then run this again"
            raise OutputError(f"another run writes to {out}", hint=hint) from None
        if is_same_file(fd, path):
            return fd
        os.close(fd)  # the run that held the lock has just deleted the file


def _move_into_place(work: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        os.rename(out, old)
    os.rename(work, out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
