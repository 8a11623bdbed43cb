"""How two checkpoints differ, tensor by tensor, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.checkpoints.gguf_checkpoint import DequantizedGGUFTensor, open_gguf, open_gguf_alone
from mergeforge.core.tensor_info import TILE_NBYTES, blocks, split_into_tiles
from mergeforge.errors import SourceError
from mergeforge.hub.download import fetch
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import Worker

SCRATCH_NBYTES = 64 << 20  # for alignment and what dequantizing a tile stages
ComparedTensor = StoredTensor | DequantizedGGUFTensor


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints.

    what: "same", "values differ", or what else differs. relative: |A - B| / |A| (Frobenius norms, in float64).
    largest: the largest absolute difference of an element. norm: |A|; change: |A - B|.
    """

    name: str
    what: str
    relative: float = 0.0
    largest: float = 0.0
    norm: float = 0.0
    change: float = 0.0

    @property
    def same(self) -> bool:
        return self.what == "same"


def differences(a: str, b: str, *, allow_pickle: bool = False) -> Iterator[TensorDifference]:
    """Compare two checkpoints (folders, Hub repos or GGUF files) tensor by tensor.

    A GGUF file is compared with a folder under the folder's tensor names, two GGUF files under their own.
    Raises SourceError for a path that holds no checkpoint, and for a model and an adapter.
    """
    first, second = _open_both(a, b, allow_pickle)
    worker = Worker("cpu", 2 * TILE_NBYTES + SCRATCH_NBYTES)
    for name in sorted({*first.tensors, *second.tensors}):
        left, right = first.tensors.get(name), second.tensors.get(name)
        if left is None or right is None:
            yield TensorDifference(name, f"only in {b if left is None else a}")
        elif left.info.shape != right.info.shape:
            yield TensorDifference(name, f"shape {list(left.info.shape)} and {list(right.info.shape)}")
        else:
            yield _compare(left, right, worker)


def _open_both(a: str, b: str, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint]:
    if _is_gguf(a) and _is_gguf(b):
        return open_gguf_alone(Path(a).expanduser(), a), open_gguf_alone(Path(b).expanduser(), b)
    if _is_gguf(a) or _is_gguf(b):
        file, other = (a, b) if _is_gguf(a) else (b, a)
        folder = _fetch(other, allow_pickle)
        if _is_adapter(folder):
            raise _model_and_adapter(file, other)
        checkpoint = _open(folder, other, allow_pickle)
        gguf = open_gguf(Path(file).expanduser(), file, checkpoint)
        return (gguf, checkpoint) if file is a else (checkpoint, gguf)
    folders = [_fetch(path, allow_pickle) for path in (a, b)]
    if _is_adapter(folders[0]) != _is_adapter(folders[1]):
        raise _model_and_adapter(*((b, a) if _is_adapter(folders[0]) else (a, b)))
    return _open(folders[0], a, allow_pickle), _open(folders[1], b, allow_pickle)


def _model_and_adapter(model: str, adapter: str) -> SourceError:
    hint = (
        "merge the adapter into its base model, then compare the two models; `mergeforge inspect` describes an adapter"
    )
    return SourceError(f"{model} is a model and {adapter} is an adapter: they have no tensors in common", hint=hint)


def _is_gguf(path: str) -> bool:
    return path.endswith(".gguf") and Path(path).expanduser().is_file()


def _fetch(path: str, allow_pickle: bool) -> Path:
    return fetch(path, None, ("model", "adapter_model"), allow_pickle=allow_pickle).path


def _is_adapter(path: Path) -> bool:
    """Whether a folder or file holds an adapter."""
    return path.name.startswith("adapter_model.") or (path.is_dir() and (path / "adapter_config.json").is_file())


def _open(folder: Path, label: str, allow_pickle: bool) -> Checkpoint:
    stem = "adapter_model" if folder.is_dir() and _is_adapter(folder) else "model"
    return open_checkpoint(folder, label, allow_pickle=allow_pickle, stem=stem)


def _compare(left: ComparedTensor, right: ComparedTensor, worker: Worker) -> TensorDifference:
    import torch

    same_dtype = left.info.dtype == right.info.dtype
    if isinstance(left, StoredTensor) and isinstance(right, StoredTensor):
        if not (left.info.is_float and right.info.is_float):
            return _compare_bytes(left, right, worker)
    else:
        same_dtype = True  # a GGUF file stores other types than a folder
    squared_difference = squared_norm = largest = 0.0
    row_nbytes = max(left.info.row_nbytes, right.info.row_nbytes, 1)
    for tile in split_into_tiles(left.info, max(1, TILE_NBYTES // row_nbytes)):
        worker.clear()
        rows = range(tile.start, tile.stop)
        left_rows = left.load(rows, worker, {}, torch.float64)
        right_rows = right.load(rows, worker, {}, torch.float64)
        for start, stop in blocks(tile, left.info):
            values, difference = left_rows(start, stop), right_rows(start, stop)
            squared_norm += float(values.square().sum())
            difference.sub_(values)
            squared_difference += float(difference.square().sum())
            largest = max(largest, float(difference.abs().max()))
    relative = math.inf if squared_difference else 0.0
    if squared_norm:
        relative = math.sqrt(squared_difference / squared_norm)
    what = "same" if squared_difference == 0 else "values differ"
    if not same_dtype:
        what = f"dtype {left.info.dtype} and {right.info.dtype}"
    norm, change = math.sqrt(squared_norm), math.sqrt(squared_difference)
    return TensorDifference(left.info.name, what, relative, largest, norm, change)


def _compare_bytes(left: StoredTensor, right: StoredTensor, worker: Worker) -> TensorDifference:
    if left.info.dtype != right.info.dtype:
        return TensorDifference(left.info.name, f"dtype {left.info.dtype} and {right.info.dtype}")
    for start in range(0, left.info.nbytes, TILE_NBYTES):
        worker.clear()
        nbytes = min(TILE_NBYTES, left.info.nbytes - start)
        left_bytes = worker.read(left.file, left.offset + start, nbytes)
        if not bool((left_bytes == worker.read(right.file, right.offset + start, nbytes)).all()):
            return TensorDifference(left.info.name, "bytes differ", math.nan, math.nan)
    return TensorDifference(left.info.name, "same")
