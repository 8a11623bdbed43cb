"""GGUF's tensor types by name. Each type registers itself at the end of its module.

    register(QuantType("Q8_0", 8, 32, 34, quantize_torch))

A new file in this package is enough for a new type: the first lookup in QUANT_TYPES imports every module here. A file
that also calls `mergeforge.gguf.file_types.register_file_type` adds a file type for `--type`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.core.registry import Registry
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

    QuantizeTorch = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class QuantType:
    """A ggml type: its number in the file, the columns and the bytes of one block, and what encodes it.

    `quantize_torch` takes rows (float32, n x columns) and the importance vector or None, and returns the blocks' bytes.
    It encodes the type on CPUs too unless the C library has a type of this name. None: only the C library encodes the
    type; if it does not have it either, tensors of the type can be copied, not encoded. `needs_importance`: there is no
    way to encode it without an importance vector.
    """

    name: str
    number: int
    block: int
    nbytes: int
    quantize_torch: QuantizeTorch | None = field(repr=False, compare=False)
    needs_importance: bool = False

    @property
    def has_native(self) -> bool:
        """Whether the C library encodes this type."""
        library = bindings.load_library()
        return library is not None and library.QUANT_TYPES.get(self.name) == (self.block, self.nbytes)

    @property
    def can_encode(self) -> bool:
        return self.quantize_torch is not None or self.has_native

    def row_nbytes(self, columns: int) -> int:
        """Bytes of a row; `columns` must be a multiple of the block."""
        return columns // self.block * self.nbytes


QUANT_TYPES: Registry[QuantType] = Registry(
    "GGUF tensor type", "mergeforge.gguf.quantize", order=lambda quant_type: quant_type.number
)


def register(quant_type: QuantType) -> QuantType:
    """Make a type available by its name."""
    return QUANT_TYPES.add(quant_type.name, quant_type)
