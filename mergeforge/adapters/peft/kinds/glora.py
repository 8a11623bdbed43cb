"""GLoRA: a multiplicative and an additive matrix for the weight, and for the bias (https://arxiv.org/abs/2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("GLORA", prefixes=("glora_",), fields="r bias config_A_B config_C config_D_E init_weights")
def glora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + W * A + B and b + b * D + E + W C (peft/tuners/glora/layer.py, merge).

    Each of A, B, C, D and E is low-rank, one number per row, one number for all, or absent.
    """
    for letter in "AB":
        _check(module, letter)
    formulas = {}
    if _has(module, "A") or _has(module, "B"):
        formulas["weight"] = _formula("A", "B")
    if any(_has(module, letter) for letter in "CDE"):
        for letter in "DE":
            _check(module, letter)
        formulas["bias"] = _bias_formula(module) if _has(module, "C") else _formula("D", "E")
    return formulas


def _bias_formula(module: AdaptedModule) -> Formula:
    """b * D + E + W C, with C (in, 1) as two factors or as it is."""
    if "glora_C.Xd" in module.shapes:
        rank = module.require("glora_C.Xd", module.in_features, None)[1]
        module.require("glora_C.Xu", rank, 1)
    else:
        module.require("glora_C.X", module.in_features, 1)
    plain = _formula("D", "E")

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        import torch

        factored = "glora_C.Xd" in factors
        column = factors["glora_C.Xd"] @ factors["glora_C.Xu"] if factored else factors["glora_C.X"]
        return {"W C": torch.cat([rows @ column for _, rows in weight()])}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        change = plain.prepare(factors)
        return lambda start, stop, base: change(start, stop, base).add_(factors["W C"][start:stop])

    nbytes = 8 * (module.in_features + module.out_features)
    return Formula("GLoRA", prepare, needs_base=True, scratch_nbytes=nbytes, scratch_blocks=3, statistic=statistic)


def _has(module: AdaptedModule, letter: str) -> bool:
    return f"glora_{letter}.X" in module.shapes or f"glora_{letter}.Xd" in module.shapes


def _check(module: AdaptedModule, letter: str) -> None:
    """Raises ValueError if one of the five does not fit the weight or the bias."""
    if f"glora_{letter}.Xd" in module.shapes and letter in "AB":
        rank = module.require(f"glora_{letter}.Xd", module.out_features, None)[1]
        module.require(f"glora_{letter}.Xu", rank, module.in_features)
    elif _has(module, letter):
        shape = module.require(f"glora_{letter}.X")
        if shape not in ((1,), (module.out_features,), (module.out_features, 1)):
            raise ValueError(
                f"{module.path}: glora_{letter} {list(shape)} does not fit its weight {list(module.weight)}"
            )


def _formula(times: str, plus: str) -> Formula:
    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            return (base * _part(factors, times, start, stop)).add_(_part(factors, plus, start, stop))

        return delta

    return Formula("GLoRA", prepare, needs_base=True, scratch_blocks=3)


def _part(factors: Mapping[str, Tensor], letter: str, start: int, stop: int) -> Tensor | float:
    """Rows of one of the five, as (rows, in) or (rows, 1), or a number."""
    if f"glora_{letter}.Xd" in factors:
        rows: Tensor = factors[f"glora_{letter}.Xd"][start:stop] @ factors[f"glora_{letter}.Xu"]
        return rows
    value = factors.get(f"glora_{letter}.X")
    if value is None:
        return 0.0
    return value.reshape(-1, 1)[start:stop] if value.numel() > 1 else float(value.sum())
