"""Backend: what computes a tensor. It is chosen here, once, and shown by `mergeforge plan -v`.

    copy    the stored bytes, unchanged
    native  the C library, on a CPU; from file to file where every input is stored in local files
    torch   everything else, on any device

native and torch write the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.disk import DiskFile
from mergeforge.native import bindings
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_inputs import ITEMSIZES
from mergeforge.tensors.stored import StoredTensor
from mergeforge.writers.encoder import TensorEncoder
from mergeforge.writers.gguf_copy import GGUFCopyEncoder
from mergeforge.writers.safetensors import SafetensorsEncoder


@dataclass(frozen=True)
class Backend:
    """What computes a tensor, in `compute` ("F32" or "F64").

    from_files: the C library reads the inputs' files. counts_natively: the C library counts magnitudes for methods
    that torch computes. lacks_library: torch computes it only because there is no C library.
    """

    name: Literal["copy", "native", "torch"]
    compute: str = "F32"
    from_files: bool = False
    counts_natively: bool = False
    lacks_library: bool = False

    @property
    def needs_torch(self) -> bool:
        return not (self.name == "copy" or self.from_files)

    @property
    def label(self) -> str:
        """In words, for the plan."""
        return {"copy": "copied", "native": "merged in C", "torch": "computed by torch"}[self.name] + (
            " from file to file" if self.from_files else ""
        )


def choose_backend(tensor: LazyTensor, info: TensorInfo, encoders: Sequence[TensorEncoder], device: str) -> Backend:
    """The backend for an output tensor that these encoders write."""
    kinds = [type(encoder) for encoder in encoders]
    to_safetensors = kinds == [SafetensorsEncoder]
    takes_bytes = to_safetensors or kinds == [GGUFCopyEncoder]
    if takes_bytes and isinstance(tensor, StoredTensor) and tensor.info.dtype == info.dtype:
        return Backend("copy")
    compute = "F64" if "F64" in (info.dtype, *_stored_dtypes(tensor)) else "F32"
    if not (device == "cpu" and compute == "F32" and _has_native(tensor)):
        return Backend("torch", compute, counts_natively=device == "cpu" and bindings.is_available())
    if not bindings.is_available():
        return Backend("torch", lacks_library=True)
    return Backend("native", from_files=to_safetensors and _is_in_files(tensor, info))


def _has_native(tensor: LazyTensor) -> bool:
    """Whether the C library merges the tensor, or one that it is computed from."""
    return (isinstance(tensor, MergedTensor) and tensor.has_native) or any(map(_has_native, tensor.inputs))


def _is_in_files(tensor: LazyTensor, info: TensorInfo) -> bool:
    return (
        isinstance(tensor, MergedTensor)
        and tensor.has_native
        and tensor.inputs_are_stored
        and all(isinstance(stored.file, DiskFile) for stored in tensor.stored_inputs)
        and info.dtype in ITEMSIZES
    )


def _stored_dtypes(tensor: LazyTensor) -> set[str]:
    return {tensor.info.dtype}.union(*(_stored_dtypes(source) for source in tensor.inputs))
