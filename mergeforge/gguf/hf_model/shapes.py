"""Shapes of stored tensors, from the shapes of the GGUF tensors that they become.

classes.json names the form of every tensor; tools/gguf_classes finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]

# The form of a stored tensor -> its shape, from the shapes of its GGUF tensors in order.
FORMS: dict[str, Callable[[Sequence[Shape]], Shape]] = {
    "same": lambda shapes: shapes[0],
    "positions": lambda shapes: shapes[0],  # with rows in front that no position has: see lay_out_tensors
    "part": lambda shapes: shapes[0][1:],  # one of the experts that are stacked in GGUF
    "one row": lambda shapes: (1, *shapes[0]),
    "convolution": lambda shapes: (shapes[0][0], 1, *shapes[0][1:]),
    "flat": lambda shapes: (math.prod(shapes[0]),),
    "rows": lambda shapes: (math.prod(shapes[0][:-1]), shapes[0][-1]),
    "joined": lambda shapes: _joined(shapes, -2),
    "joined columns": lambda shapes: _joined(shapes, -1),
    "joined parts": lambda shapes: _joined([shape[1:] for shape in shapes], -2),
}
# Forms of tensors of which one GGUF tensor at least is transposed.
TRANSPOSED_FORMS: dict[str, Callable[[Sequence[Shape]], Shape]] = {
    "transposed": lambda shapes: _transposed(shapes[0]),
    "transposed rows": lambda shapes: (shapes[0][0] * shapes[0][2], shapes[0][1]),
    "joined transposed": lambda shapes: _joined([_transposed(shape) for shape in shapes], -1),
    "joined columns": lambda shapes: _joined(shapes, -1),
    "heads": lambda shapes: (shapes[0][0] * (shapes[0][2] + shapes[1][1]), shapes[0][1]),
}


def stored_shape(form: str, shapes: Sequence[Shape]) -> Shape:
    """The shape of a stored tensor of this form."""
    return (FORMS | TRANSPOSED_FORMS)[form](shapes)


def _joined(shapes: Sequence[Shape], axis: int) -> Shape:
    """Equal shapes but for one axis, one after the other."""
    axis = max(axis, -len(shapes[0]))
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    return tuple(whole)


def _transposed(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
