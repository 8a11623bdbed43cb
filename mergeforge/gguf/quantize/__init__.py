"""GGUF's tensor types, and encoding float32 rows in them: byte for byte as ggml's reference code does.

Every type is written twice, side by side in its file: as kernels for the CPU (see compiled; they need numba,
the extra `fast`) and in torch for any device. Both give the same bytes, those of an x86-64 build of
ggml without fused multiply-adds. Bytes never depend on the device, the threads or how rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeforge.gguf.quantize import floats, iq4, legacy, numba_kernel, q2_k, q3_k, q4_k, q6_k, q8_0

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class QuantType:
    """A ggml type: its number in the file, columns of one block and bytes of one block."""

    name: str
    number: int
    block: int
    nbytes: int

    def row_nbytes(self, columns: int) -> int:
        """Bytes of a row; `columns` must be a multiple of the block."""
        return columns // self.block * self.nbytes


QUANT_TYPES = {
    one.name: one
    for one in (
        QuantType("F32", 0, 1, 4),
        QuantType("F16", 1, 1, 2),
        QuantType("Q4_0", 2, 32, 18),
        QuantType("Q4_1", 3, 32, 20),
        QuantType("Q5_0", 6, 32, 22),
        QuantType("Q5_1", 7, 32, 24),
        QuantType("Q8_0", 8, 32, 34),
        QuantType("Q2_K", 10, 256, 84),
        QuantType("Q3_K", 11, 256, 110),
        QuantType("Q4_K", 12, 256, 144),
        QuantType("Q5_K", 13, 256, 176),
        QuantType("Q6_K", 14, 256, 210),
        QuantType("IQ4_NL", 20, 32, 18),
        QuantType("IQ4_XS", 23, 256, 136),
        QuantType("BF16", 30, 1, 2),
    )
}

# name -> in torch (rows, importance or None) -> blocks; kernel (flat rows, importance or empty, blocks' bytes)
_ENCODERS: dict[str, tuple[Callable[..., Tensor], Callable[..., None]]] = {
    "Q8_0": (q8_0.encoded, q8_0.encode_blocks),
    "Q4_0": (partial(legacy.encoded, 4, False), partial(legacy.encode_blocks, 4, False)),
    "Q4_1": (partial(legacy.encoded, 4, True), partial(legacy.encode_blocks, 4, True)),
    "Q5_0": (partial(legacy.encoded, 5, False), partial(legacy.encode_blocks, 5, False)),
    "Q5_1": (partial(legacy.encoded, 5, True), partial(legacy.encode_blocks, 5, True)),
    "Q2_K": (q2_k.encoded, q2_k.encode_blocks),
    "Q3_K": (q3_k.encoded, q3_k.encode_blocks),
    "Q4_K": (partial(q4_k.encoded, 4), partial(q4_k.encode_blocks, 4)),
    "Q5_K": (partial(q4_k.encoded, 5), partial(q4_k.encode_blocks, 5)),
    "Q6_K": (q6_k.encoded, q6_k.encode_blocks),
    "IQ4_NL": (partial(iq4.encoded, 32), partial(iq4.encode_blocks, 32)),
    "IQ4_XS": (partial(iq4.encoded, 256), partial(iq4.encode_blocks, 256)),
}
_CPU_CHUNK = 1 << 18  # elements at a time in torch: its temporaries then stay in the second cache
_CUDA_CHUNK = 1 << 22  # more, because every operation costs a launch
_LIVE = 24  # float32 temporaries of a chunk: about 12 live, as much again that the allocator keeps; a test measures
_KERNEL_NBYTES = 1 << 17  # all buffers of one kernel call


def backend(device: str) -> str:
    """What encodes on a device: "numba" on the CPU where it is installed, else "torch"."""
    return "numba" if device.split(":")[0] == "cpu" and numba_kernel.available() else "torch"


def scratch_nbytes(kind: QuantType, device: str) -> int:
    """The most memory that encode() holds besides its input and its output."""
    if kind.block == 1:
        return 0
    if backend(device) == "numba":
        return _KERNEL_NBYTES
    return _LIVE * 4 * (_CPU_CHUNK if device.split(":")[0] == "cpu" else _CUDA_CHUNK)


def encode(kind: QuantType, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Rows (float32, n x columns, any device) as the type's bytes: uint8, n x row_nbytes, same device.

    `importance` (float32, columns): the imatrix's weight of every column. Rows are contiguous and finite.
    Raises ValueError for another dtype, and for columns that are no multiple of the type's block.
    """
    import torch

    count, columns = rows.shape
    if rows.dtype != torch.float32:
        raise ValueError(f"rows must be float32, not {rows.dtype}")
    if columns % kind.block:
        raise ValueError(f"{kind.name} needs columns in multiples of {kind.block}, not {columns}")
    if kind.block == 1:
        return floats.encoded(kind.name, rows)
    out = torch.empty((count, kind.row_nbytes(columns)), dtype=torch.uint8, device=rows.device)
    if out.numel():
        fill = _fill_compiled if backend(rows.device.type) == "numba" else _fill
        fill(kind, rows, importance, out)
    return out


def _fill_compiled(kind: QuantType, rows: Tensor, importance: Tensor | None, out: Tensor) -> None:
    import numpy as np

    weights: Any = np.empty(0, np.float32) if importance is None else importance.numpy()
    _ENCODERS[kind.name][1](rows.detach().numpy().reshape(-1), weights, out.numpy().reshape(-1, kind.nbytes))


def _fill(kind: QuantType, rows: Tensor, importance: Tensor | None, out: Tensor) -> None:
    chunk = _CPU_CHUNK if rows.device.type == "cpu" else _CUDA_CHUNK
    height = max(1, chunk // rows.shape[1])
    for start in range(0, len(rows), height):
        part = rows[start : start + height]
        out[start : start + height] = _ENCODERS[kind.name][0](part, importance).reshape(len(part), -1)
