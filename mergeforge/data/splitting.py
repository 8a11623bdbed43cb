"""Splitting: which rows are held out, by what they hold.

Rows are ordered by a hash of their content and of the seed; the first ones are held out. So the number is exact, equal
rows are on one side, and neither the order of the rows nor the names of the files matter. When rows are added,
those that were there keep their side, but for a few at the border.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def held_out(keys: NDArray[np.uint64], wanted: float | int) -> NDArray[np.bool_]:
    """Which of the rows with these keys are held out. `wanted`: a share of the different rows, or a number of them.

    Raises RecipeError where nothing would be left to train on.
    """
    import numpy as np

    different = np.unique(keys)
    share = isinstance(wanted, float)
    count = max(1, round(wanted * len(different))) if share else int(wanted)
    if count >= len(different):
        text = f"val: {wanted:g} of {len(different)} different rows leaves none to train on"
        raise RecipeError(text, hint="hold out fewer, or give a path")
    held: NDArray[np.bool_] = keys <= different[count - 1]
    return held
