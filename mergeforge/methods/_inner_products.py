"""Inner products of whole tensors, summed block by block: all that methods on directions need to know.

Such a method computes a weighted sum of its inputs, and the weights depend on the inputs' inner
products alone. So one scan of the tensor gives the weights, and combining is one weighted sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.methods import BlockScan
from mergeforge.methods._sub_blocks import by_elements

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[np.float64]


def gram(scan: BlockScan) -> Matrix:
    """The matrix of the inputs' inner products; 0 x 0 for a tensor without elements.

    Products are added up in float64, so that the native library and torch give the same weights.
    """
    import numpy as np

    native_products = getattr(scan, "inner_products", None)
    block_sums = list(native_products() if native_products else scan(lambda inputs, block: _block_products(inputs)))
    count = (math.isqrt(8 * len(block_sums[0]) + 1) - 1) // 2 if block_sums else 0
    products = np.zeros((count, count))
    if block_sums:
        upper = np.triu_indices(count)
        products[upper] = products.T[upper] = np.sum(block_sums, axis=0)
    return products


def _block_products(inputs: list[Tensor]) -> Matrix:
    """The inner products of each input with itself and the inputs after it, in one block."""
    import numpy as np
    import torch

    total = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs[0].device)
    for part in by_elements(inputs):
        stacked = torch.stack(part).double()
        total.addmm_(stacked, stacked.T)
    return total.cpu().numpy()[np.triu_indices(len(inputs))]


def lengths(products: Matrix) -> Matrix:
    """The inputs' norms, from their inner products."""
    import numpy as np

    return np.sqrt(np.maximum(products.diagonal(), 0))


def is_vector(scan: BlockScan) -> bool:
    """Whether the tensor is 1-D; methods treat such a tensor as a single row."""
    return next(iter(scan(lambda inputs, block: block.is_vector, sample=1)), False)
