"""Encoding float32 rows in GGUF's tensor types, with the same bytes as ggml's reference code.

Types are implemented twice: in the C library (native/quantize*.c) for the CPU, and here in torch for any device. Those
of 1 to 3 bits that search a grid (iq_grids.py) are in the C library alone, which then encodes rows of any device. Both
give the bytes of an x86-64 build of ggml without fused multiply-adds. The bytes do not depend on the device, the
threads or how the rows are cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.quant_type import QUANT_TYPES, QuantType, register
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.gguf.quantize.quant_type import QuantizeTorch

__all__ = ["QUANT_TYPES", "QuantType", "backend_for", "encode", "register", "scratch_nbytes"]

CPU_CHUNK = 1 << 18  # elements that torch encodes at a time: their temporaries fit into the second-level cache
CUDA_CHUNK = 1 << 22  # more, because every operation costs a launch
LIVE_CHUNKS = 24  # float32 temporaries of a chunk: about 12 live, and as many that the allocator keeps; a test measures
NATIVE_NBYTES = 1 << 16  # buffers of one call of the C library, on the thread's stack: at most 48 KiB


def backend_for(device: str) -> str:
    """What encodes on a device: "native", the C library, on the CPU if there is one; else "torch"."""
    return "native" if device.split(":")[0] == "cpu" and bindings.is_available() else "torch"


def scratch_nbytes(quant_type: QuantType, device: str) -> int:
    """The most memory that encode() uses besides its input and its output."""
    if quant_type.block == 1:
        return 0
    if _is_native(quant_type, backend_for(device)):
        return NATIVE_NBYTES
    return LIVE_CHUNKS * 4 * (CPU_CHUNK if device.split(":")[0] == "cpu" else CUDA_CHUNK)


def encode(quant_type: QuantType, rows: Tensor, importance: Tensor | None = None, *, backend: str = "") -> Tensor:
    """Rows (float32, n x columns, any device) as the type's bytes: uint8, n x row_nbytes, same device.

    `importance` (float32, columns): the imatrix's weight of every column. Rows are contiguous and finite. `backend`:
    "native" or "torch" (default: backend_for the device); each encodes the types that the other does not have. Raises
    ValueError for another dtype, for columns that are not a multiple of the type's block, for a type that can only be
    copied, and if there is no importance vector for a type that needs one.
    """
    import torch

    count, columns = rows.shape
    if not quant_type.can_encode:
        raise ValueError(f"{quant_type.name} cannot be encoded")
    if quant_type.needs_importance and importance is None:
        raise ValueError(f"{quant_type.name} needs an importance vector")
    if rows.dtype != torch.float32:
        raise ValueError(f"rows must be float32, not {rows.dtype}")
    if columns % quant_type.block:
        raise ValueError(f"{quant_type.name} needs columns in multiples of {quant_type.block}, not {columns}")
    quantize_torch = quant_type.quantize_torch
    if quant_type.block == 1 and quantize_torch:
        return quantize_torch(rows, None)
    native = quantize_torch is None or _is_native(quant_type, backend or backend_for(rows.device.type))
    device = torch.device("cpu") if native else rows.device
    out = torch.empty((count, quant_type.row_nbytes(columns)), dtype=torch.uint8, device=device)
    if not out.numel():
        return out.to(rows.device)
    if native:
        weights = None if importance is None else importance.cpu().numpy()
        bindings.kernels().quantize(quant_type.name, rows.detach().cpu().numpy(), weights, columns, out.numpy())
        return out.to(rows.device)
    assert quantize_torch is not None
    _encode_torch(quantize_torch, rows, importance, out)
    return out


def _is_native(quant_type: QuantType, backend: str) -> bool:
    """Whether the C library encodes the type, for this choice of a backend."""
    return quant_type.has_native and (backend == "native" or quant_type.quantize_torch is None)


def _encode_torch(quantize_torch: QuantizeTorch, rows: Tensor, importance: Tensor | None, out: Tensor) -> None:
    chunk_elements = CPU_CHUNK if rows.device.type == "cpu" else CUDA_CHUNK
    chunk_rows = max(1, chunk_elements // rows.shape[1])
    for start in range(0, len(rows), chunk_rows):
        chunk = rows[start : start + chunk_rows]
        out[start : start + chunk_rows] = quantize_torch(chunk, importance).reshape(len(chunk), -1)
