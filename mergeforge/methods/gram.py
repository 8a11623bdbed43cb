"""Inner products of whole tensors, summed part by part: all that methods on directions need to know.

What such a method computes is a weighted sum of its inputs, and the weights depend on the inputs'
inner products alone. So a tensor is looked at once, and combining it is one weighted sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import Look
from mergeforge.methods.parts import by_elements

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[np.float64]


def gram(look: Look) -> Matrix:
    """The matrix of the inputs' inner products; 0 x 0 for a tensor without elements.

    Products are summed in float32 over 64 thousand elements (torch adds pairwise: that errs by 1e-8 of the
    norms) and then in float64, in half the time of float64 throughout.
    """
    import numpy as np

    seen = list(look(lambda inputs, block: np.sum([_products(part) for part in by_elements(inputs, made=1)], axis=0)))
    return np.sum(seen, axis=0) if seen else np.zeros((0, 0))


def _products(part: list[Tensor]) -> Matrix:
    import numpy as np
    import torch

    upper = np.triu_indices(len(part))
    sums = torch.stack([(part[row] * part[column]).sum() for row, column in zip(*upper, strict=True)])
    products = np.zeros((len(part), len(part)))
    products[upper] = products.T[upper] = sums.double().cpu().numpy()
    return products


def lengths(products: Matrix) -> Matrix:
    """The inputs' norms, from their inner products."""
    import numpy as np

    return np.sqrt(np.maximum(products.diagonal(), 0))


def is_vector(look: Look) -> bool:
    """Whether the tensor is 1-D: such a one counts as a single row."""
    return next(iter(look(lambda inputs, block: block.is_vector, sample=1)), False)
