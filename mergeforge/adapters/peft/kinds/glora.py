"""GLoRA: the weight times one matrix plus another, the bias likewise (https://arxiv.org/abs/2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("GLORA", prefixes=("glora_",), fields="r bias config_A_B config_C config_D_E init_weights")
def glora(config: Config, module: Module) -> dict[str, Formula]:
    """W + W * A + B and b + b * D + E (peft/tuners/glora/layer.py, merge).

    Each of the five is low-rank, one number for each output, one for all, or nothing.
    """
    if "glora_C.X" in module.shapes or "glora_C.Xd" in module.shapes:
        reason = "its bias takes part of the weight (config_C)"
        raise ValueError(f"{module.path}: {reason}, which is not supported: merge it with PEFT")
    for letter in "AB":
        _check(module, letter)
    formulas = {}
    if _has(module, "A") or _has(module, "B"):
        formulas["weight"] = _formula("A", "B")
    if _has(module, "D") or _has(module, "E"):
        for letter in "DE":
            _check(module, letter)
        formulas["bias"] = _formula("D", "E")
    return formulas


def _has(module: Module, letter: str) -> bool:
    return f"glora_{letter}.X" in module.shapes or f"glora_{letter}.Xd" in module.shapes


def _check(module: Module, letter: str) -> None:
    """Raises ValueError for a part of another shape than the weight's or bias' outputs."""
    if f"glora_{letter}.Xd" in module.shapes and letter in "AB":
        rank = module.require(f"glora_{letter}.Xd", module.outside, None)[1]
        module.require(f"glora_{letter}.Xu", rank, module.inside)
    elif _has(module, letter):
        shape = module.require(f"glora_{letter}.X")
        if shape not in ((1,), (module.outside,), (module.outside, 1)):
            raise ValueError(f"{module.path}: glora_{letter} {list(shape)} does not fit {list(module.weight)}")


def _formula(times: str, plus: str) -> Formula:
    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            return (base * _part(factors, times, start, stop)).add_(_part(factors, plus, start, stop))

        return delta

    return Formula("GLoRA", prepare, needs_base=True, live=3)


def _part(factors: Mapping[str, Tensor], letter: str, start: int, stop: int) -> Tensor | float:
    """Rows of one of the five: (rows, in) or (rows, 1), or a number."""
    if f"glora_{letter}.Xd" in factors:
        rows: Tensor = factors[f"glora_{letter}.Xd"][start:stop] @ factors[f"glora_{letter}.Xu"]
        return rows
    value = factors.get(f"glora_{letter}.X")
    if value is None:
        return 0.0
    return value.reshape(-1, 1)[start:stop] if value.numel() > 1 else float(value.sum())
