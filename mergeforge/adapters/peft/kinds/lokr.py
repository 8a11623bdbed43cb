"""LoKr: a Kronecker product, whose sides may be low-rank (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, pattern_value

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = (
    "r alpha rank_pattern alpha_pattern rank_dropout rank_dropout_scale module_dropout use_effective_conv2d "
    "decompose_both decompose_factor"
)


@adapter("LOKR", prefixes=("lokr_",), fields=_FIELDS)
def lokr(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + alpha / r * kron(w1, w2), with w1 = w1_a w1_b or w2 = w2_a w2_b if these are low-rank.

    The scale is alpha / r even if both are full matrices (peft/tuners/lokr/layer.py, get_delta_weight).
    """
    rank = pattern_value(config, "rank_pattern", "r", module.path)
    scale = pattern_value(config, "alpha_pattern", "alpha", module.path) / rank
    if len(module.weight) == len(module.shapes.get("lokr_w2", ())) == 3:
        return {"weight": _conv1d_formula(module, scale)}
    return {"weight": kronecker_formula(module, scale)}


def kronecker_formula(module: AdaptedModule, scale: float) -> Formula:
    """s * kron(w1, w2); for a convolution, w2 may have a core t2 (r, r, *kernel). Raises ValueError."""
    rows, columns = zip(*(_kron_factor_shape(module, number) for number in "12"), strict=True)
    if rows[0] * rows[1] != module.out_features or columns[0] * columns[1] != module.in_features:
        sizes = f"{rows[0]}x{columns[0]} and {rows[1]}x{columns[1]}"
        raise ValueError(f"{module.path}: factors of {sizes} do not make its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        w1, w2 = (_kron_factor(factors, number) for number in "12")

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            index = torch.arange(start, stop, device=w1.device)
            outer, inner = w1[index // len(w2)], w2[index % len(w2)]
            return (outer.unsqueeze(2) * inner.unsqueeze(1)).flatten(1).mul_(scale)

        return delta

    nbytes = 8 * sum(row * column for row, column in zip(rows, columns, strict=True))
    return Formula("LoKr", prepare, scratch_nbytes=nbytes, scratch_blocks=3, details={"scale": scale})


def _conv1d_formula(module: AdaptedModule, scale: float) -> Formula:
    """PEFT's product for a Conv1d with a full w2 (c, d, width), as it trains it: kron of w1 (1, a, b) and w2.

    PEFT reinterprets the result (c, a * d, b * width), in memory order, as (out, in, width) (make_kron of
    peft/tuners/lokr/layer.py).
    """
    rows, columns = _kron_factor_shape(module, "1")
    high, deep, width = module.shapes["lokr_w2"]
    if rows * high != module.out_features or columns * deep * width != module.in_features:
        raise ValueError(f"{module.path}: its factors do not make its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        w1, w2 = _kron_factor(factors, "1"), factors["lokr_w2"]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            flat_index = torch.arange(start * module.in_features, stop * module.in_features, device=w1.device)
            place, column = flat_index // (columns * width), flat_index % (columns * width)
            first, row = place // (rows * deep), place % (rows * deep)
            product = w1[row // deep, column // width] * w2[first, row % deep, column % width]
            return product.view(stop - start, -1).mul_(scale)

        return delta

    return Formula("LoKr", prepare, scratch_blocks=14, details={"scale": scale})


def _kron_factor(factors: Mapping[str, Tensor], number: str) -> Tensor:
    """One side of the Kronecker product, as a matrix."""
    whole = factors.get(f"lokr_w{number}")
    if whole is not None:
        return whole.flatten(1)
    a, b = factors[f"lokr_w{number}_a"], factors[f"lokr_w{number}_b"]
    core = factors.get(f"lokr_t{number}")
    if core is None:
        return a @ b.flatten(1)
    spread = core.flatten(2).transpose(1, 2) @ b  # (r, kernel, d)
    return a.t() @ spread.transpose(1, 2).flatten(1)


def _kron_factor_shape(module: AdaptedModule, number: str) -> tuple[int, int]:
    """(rows, columns) of one side of the Kronecker product."""
    if f"lokr_w{number}" in module.shapes:
        whole = module.require(f"lokr_w{number}")
        return whole[0], prod(whole[1:])
    a, b = module.require(f"lokr_w{number}_a"), module.require(f"lokr_w{number}_b")
    if len(a) != 2 or (f"lokr_t{number}" in module.shapes and len(b) != 2):
        raise ValueError(f"{module.path}: its lokr_w{number}_a and lokr_w{number}_b are not matrices")
    if f"lokr_t{number}" in module.shapes:
        core = module.require(f"lokr_t{number}", a[0], b[0], *(None,) * (len(module.shapes[f"lokr_t{number}"]) - 2))
        return a[1], b[1] * prod(core[2:])
    if a[1] != b[0]:
        raise ValueError(f"{module.path}: its lokr_w{number}_a and lokr_w{number}_b have different ranks")
    return a[0], prod(b[1:])
