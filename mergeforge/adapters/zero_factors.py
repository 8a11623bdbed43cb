"""Whether an adapter changes nothing: LoRA whose every product has a factor of zeros, as before training."""

from __future__ import annotations

import numpy as np

from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.adapters.expert_deltas import ExpertLoraDelta, RowRangeDelta
from mergeforge.adapters.match import Adapter
from mergeforge.io.disk import DiskFile
from mergeforge.tensors.stored import StoredTensor

CHUNK = 1 << 20  # bytes that are read at a time


def changes_nothing(adapter: Adapter) -> bool:
    """Whether every delta is a LoRA product with a factor of zeros.

    Reads up to the first delta that is not zero: a few kilobytes, unless the adapter does change nothing. Adapters of
    other kinds, and those that are not on a local disk, are not read.
    """
    deltas = [delta for group in adapter.deltas.values() for delta in group]
    return bool(deltas) and not (adapter.resized or adapter.added) and all(map(_is_zero, deltas))


def _is_zero(delta: WeightDelta) -> bool:
    if isinstance(delta, RowRangeDelta):
        return _is_zero(delta.delta)
    if isinstance(delta, ExpertLoraDelta):
        return _holds_zeros(delta.b) or _holds_zeros(delta.a)
    return isinstance(delta, LoraDelta) and (_holds_zeros(delta.left) or _holds_zeros(delta.right))


def _holds_zeros(tensor: StoredTensor) -> bool:
    if not isinstance(tensor.file, DiskFile):
        return False
    bits = tensor.info.bits
    without_sign = (1 << (bits - 1)) - 1  # -0.0 is zero too
    try:
        for start in range(0, tensor.info.nbytes, CHUNK):
            data = np.empty(min(CHUNK, tensor.info.nbytes - start) // (bits // 8), f"u{bits // 8}")
            tensor.file.read_into(data.data.cast("B"), tensor.offset + start, keep=True)
            if (data & data.dtype.type(without_sign)).any():
                return False
        return True
    finally:
        tensor.file.close()  # opened again when it is merged
