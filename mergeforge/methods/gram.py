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
    """The matrix of the inputs' inner products, in float64; 0 x 0 for a tensor without elements."""
    import numpy as np

    seen = list(look(lambda inputs, block: np.sum([_products(part) for part in by_elements(inputs)], axis=0)))
    return np.sum(seen, axis=0) if seen else np.zeros((0, 0))


def _products(part: list[Tensor]) -> Matrix:
    import torch

    rows = torch.stack(part).double()
    products: Matrix = (rows @ rows.T).cpu().numpy()
    return products


def lengths(products: Matrix) -> Matrix:
    """The inputs' norms, from their inner products."""
    import numpy as np

    return np.sqrt(np.maximum(products.diagonal(), 0))


def combined(inputs: list[Tensor], weights: list[float]) -> Tensor:
    """sum(weight_i * input_i), overwriting the inputs."""
    total = inputs[0].mul_(weights[0])
    for one, weight in zip(inputs[1:], weights[1:], strict=True):
        total.add_(one.mul_(weight))
    return total


def is_vector(look: Look) -> bool:
    """Whether the tensor is 1-D: such a one counts as a single row."""
    return next(iter(look(lambda inputs, block: block.is_vector, sample=1)), False)
