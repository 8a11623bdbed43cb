"""LoKr: a Kronecker product, either side of which may be low-rank (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter, by_pattern

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = (
    "r alpha rank_pattern alpha_pattern rank_dropout rank_dropout_scale module_dropout use_effective_conv2d "
    "decompose_both decompose_factor"
)


@adapter("LOKR", prefixes=("lokr_",), fields=_FIELDS)
def lokr(config: Config, module: Module) -> dict[str, Formula]:
    """W + alpha / r * kron(w1, w2), with w1 = w1_a w1_b or w2 = w2_a w2_b where these are low-rank.

    The scale is alpha / r also where both are whole (peft/tuners/lokr/layer.py, get_delta_weight).
    """
    rank = by_pattern(config, "rank_pattern", "r", module.path)
    scale = by_pattern(config, "alpha_pattern", "alpha", module.path) / rank
    if len(module.weight) == len(module.shapes.get("lokr_w2", ())) == 3:
        return {"weight": _misplaced(module, scale)}
    return {"weight": kronecker(module, scale)}


def kronecker(module: Module, scale: float) -> Formula:
    """s * kron(w1, w2), where a convolution's w2 may have a core (r, r, *kernel) as t2. Raises ValueError."""
    rows, columns = zip(*(_size(module, number) for number in "12"), strict=True)
    if rows[0] * rows[1] != module.outside or columns[0] * columns[1] != module.inside:
        got = f"{rows[0]}x{columns[0]} and {rows[1]}x{columns[1]}"
        raise ValueError(f"{module.path}: factors of {got} do not make its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        one, two = (_side(factors, number) for number in "12")

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            index = torch.arange(start, stop, device=one.device)
            outer, inner = one[index // len(two)], two[index % len(two)]
            return (outer.unsqueeze(2) * inner.unsqueeze(1)).flatten(1).mul_(scale)

        return delta

    held = 8 * sum(row * column for row, column in zip(rows, columns, strict=True))
    return Formula("LoKr", prepare, fixed=held, live=3, facts={"scale": scale})


def _misplaced(module: Module, scale: float) -> Formula:
    """PEFT's product for a Conv1d with a whole w2 (c, d, width), which it trains with: kron of w1 (1, a, b) and w2.

    Its numbers (c, a * d, b * width) are read in order as (out, in, width) (peft/tuners/lokr/layer.py, make_kron).
    """
    rows, columns = _size(module, "1")
    high, deep, width = module.shapes["lokr_w2"]
    if rows * high != module.outside or columns * deep * width != module.inside:
        raise ValueError(f"{module.path}: its factors do not make its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        one, two = _side(factors, "1"), factors["lokr_w2"]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            at = torch.arange(start * module.inside, stop * module.inside, device=one.device)
            place, column = at // (columns * width), at % (columns * width)
            first, row = place // (rows * deep), place % (rows * deep)
            product = one[row // deep, column // width] * two[first, row % deep, column % width]
            return product.view(stop - start, -1).mul_(scale)

        return delta

    return Formula("LoKr", prepare, live=14, facts={"scale": scale})


def _side(factors: Mapping[str, Tensor], number: str) -> Tensor:
    """One side of the product as a matrix."""
    whole = factors.get(f"lokr_w{number}")
    if whole is not None:
        return whole.flatten(1)
    a, b = factors[f"lokr_w{number}_a"], factors[f"lokr_w{number}_b"]
    core = factors.get(f"lokr_t{number}")
    if core is None:
        return a @ b.flatten(1)
    spread = core.flatten(2).transpose(1, 2) @ b  # (r, kernel, d)
    return a.t() @ spread.transpose(1, 2).flatten(1)


def _size(module: Module, number: str) -> tuple[int, int]:
    """(rows, columns) of one side of the product."""
    if f"lokr_w{number}" in module.shapes:
        whole = module.require(f"lokr_w{number}")
        return whole[0], prod(whole[1:])
    a, b = module.require(f"lokr_w{number}_a"), module.require(f"lokr_w{number}_b")
    if len(a) != 2 or (f"lokr_t{number}" in module.shapes and len(b) != 2):
        raise ValueError(f"{module.path}: its lokr_w{number}_a and lokr_w{number}_b are no matrices")
    if f"lokr_t{number}" in module.shapes:
        core = module.require(f"lokr_t{number}", a[0], b[0], *(None,) * (len(module.shapes[f"lokr_t{number}"]) - 2))
        return a[1], b[1] * prod(core[2:])
    if a[1] != b[0]:
        raise ValueError(f"{module.path}: its lokr_w{number}_a and lokr_w{number}_b have different ranks")
    return a[0], prod(b[1:])
