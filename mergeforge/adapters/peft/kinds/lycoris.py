"""LyCORIS' methods other than LoRA: LoHa and LoKr with LyCORIS' scales, and DoRA on top of both.

It is not a PEFT type, so it is not registered: formats/kohya_diffusers.py uses it for files with kohya's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, PeftMethod
from mergeforge.adapters.peft.kinds.loha import loha
from mergeforge.adapters.peft.kinds.lokr import kronecker_formula

if TYPE_CHECKING:
    from torch import Tensor

DORA_SCALE = "dora_scale"


def lycoris(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + alpha / r * the product, with alpha from the file (`config["alphas"]`, by module), or r if it has none.

    A LoKr with two full factors has no rank, and its scale is 1 (lycoris/modules/loha.py and lokr.py).
    """
    alpha = config["alphas"].get(module.path)
    if "hada_w1_b" in module.shapes:
        formula = loha({"alpha": alpha or module.shapes["hada_w1_b"][0]}, module)["weight"]
    else:
        rank_role = next((role for role in ("lokr_w1_b", "lokr_w2_b") if role in module.shapes), "")
        rank = module.shapes[rank_role][0] if rank_role else 1
        formula = kronecker_formula(module, (alpha or rank) / rank if rank_role else 1.0)
    return {"weight": dora_of(formula, module) if DORA_SCALE in module.shapes else formula}


LYCORIS = PeftMethod(
    "LyCORIS", ("hada_", "lokr_", DORA_SCALE), lycoris, frozenset(), "LoHa and LoKr as LyCORIS scales them"
)


def dora_of(formula: Formula, module: AdaptedModule) -> Formula:
    """m / |V| * V - W with V = W plus the formula's delta, and a norm per output."""
    if prod(module.shapes[DORA_SCALE]) != module.out_features or module.shapes[DORA_SCALE][0] != module.out_features:
        shapes = f"{list(module.shapes[DORA_SCALE])} for weight {list(module.weight)}"
        raise ValueError(f"{module.path}: a dora_scale per input ({shapes}) is not supported")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        change, magnitude = formula.prepare(factors), factors[DORA_SCALE].reshape(-1, 1)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = change(start, stop, base).add_(base)
            return value.mul_(magnitude[start:stop] / value.norm(dim=1, keepdim=True)).sub_(base)

        return delta

    label = f"{formula.label}, decomposed"
    return Formula(
        label,
        prepare,
        needs_base=True,
        scratch_nbytes=formula.scratch_nbytes,
        scratch_blocks=formula.scratch_blocks + 1,
        details=formula.details,
    )
