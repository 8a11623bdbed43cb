"""Inner products of whole tensors, summed part by part: all that methods on directions need to know.

What such a method computes is a weighted sum of its inputs, and the weights depend on the inputs'
inner products alone. So a tensor is looked at once, and combining it is one weighted sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.methods import Look
from mergeforge.methods._sub_blocks import by_elements

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[np.float64]


def gram(look: Look) -> Matrix:
    """The matrix of the inputs' inner products; 0 x 0 for a tensor without elements.

    Products are added up in float64, so that the methods' weights are the same whoever adds them up.
    """
    import numpy as np

    products_of = getattr(look, "products", None)
    seen = list(products_of() if products_of else look(lambda inputs, block: _products(inputs)))
    count = (math.isqrt(8 * len(seen[0]) + 1) - 1) // 2 if seen else 0
    products = np.zeros((count, count))
    if seen:
        upper = np.triu_indices(count)
        products[upper] = products.T[upper] = np.sum(seen, axis=0)
    return products


def _products(inputs: list[Tensor]) -> Matrix:
    """The inner product of each input with itself and those that follow it, of a block."""
    import numpy as np
    import torch

    total = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs[0].device)
    for part in by_elements(inputs):
        wide = torch.stack(part).double()
        total.addmm_(wide, wide.T)
    return total.cpu().numpy()[np.triu_indices(len(inputs))]


def lengths(products: Matrix) -> Matrix:
    """The inputs' norms, from their inner products."""
    import numpy as np

    return np.sqrt(np.maximum(products.diagonal(), 0))


def is_vector(look: Look) -> bool:
    """Whether the tensor is 1-D: such a one counts as a single row."""
    return next(iter(look(lambda inputs, block: block.is_vector, sample=1)), False)
