"""LoKr: a Kronecker product, either side of which may be low-rank (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.kinds import Config, Delta, Formula, Module, adapter, by_pattern

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
    if "lokr_t2" in module.shapes:
        raise ValueError(f"{module.path}: LoKr with a Tucker core (use_effective_conv2d) is not supported")
    rows = [_rows(module, number) for number in "12"]
    columns = [_columns(module, number) for number in "12"]
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

    held = 4 * sum(row * column for row, column in zip(rows, columns, strict=True))
    return {"weight": Formula("LoKr", prepare, fixed=held, live=3, facts={"scale": scale})}


def _side(factors: Mapping[str, Tensor], number: str) -> Tensor:
    whole = factors.get(f"lokr_w{number}")
    if whole is None:
        whole = factors[f"lokr_w{number}_a"] @ factors[f"lokr_w{number}_b"].flatten(1)
    return whole.flatten(1)


def _rows(module: Module, number: str) -> int:
    name = f"lokr_w{number}" if f"lokr_w{number}" in module.shapes else f"lokr_w{number}_a"
    return module.require(name)[0]


def _columns(module: Module, number: str) -> int:
    import math

    name = f"lokr_w{number}" if f"lokr_w{number}" in module.shapes else f"lokr_w{number}_b"
    return math.prod(module.require(name)[1:])
