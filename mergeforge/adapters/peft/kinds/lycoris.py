"""What LyCORIS has beside LoRA: LoHa and LoKr with scales of their own, and the weight decomposed (DoRA) of both.

Not a PEFT type, so not registered: sources/dialects reads it from files in kohya's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Kind, Module
from mergeforge.adapters.peft.kinds.loha import loha
from mergeforge.adapters.peft.kinds.lokr import kronecker

if TYPE_CHECKING:
    from torch import Tensor

SCALE = "dora_scale"


def lycoris(config: Config, module: Module) -> dict[str, Formula]:
    """W + alpha / r * the product, alpha from the file (r where it has none): `config["alphas"]` by module.

    A LoKr with two whole factors has no rank, and the scale 1 (lycoris/modules/loha.py and lokr.py).
    """
    alpha = config["alphas"].get(module.path)
    if "hada_w1_b" in module.shapes:
        formula = loha({"alpha": alpha or module.shapes["hada_w1_b"][0]}, module)["weight"]
    else:
        low = next((role for role in ("lokr_w1_b", "lokr_w2_b") if role in module.shapes), "")
        rank = module.shapes[low][0] if low else 1
        formula = kronecker(module, (alpha or rank) / rank if low else 1.0)
    return {"weight": decomposed(formula, module) if SCALE in module.shapes else formula}


LYCORIS = Kind("LyCORIS", ("hada_", "lokr_", SCALE), lycoris, frozenset(), "LoHa and LoKr as LyCORIS scales them")


def decomposed(formula: Formula, module: Module) -> Formula:
    """m / |V| * V - W with V = W plus the formula's change, the norm over each output's weights."""
    if prod(module.shapes[SCALE]) != module.outside or module.shapes[SCALE][0] != module.outside:
        shapes = f"{list(module.shapes[SCALE])} beside {list(module.weight)}"
        raise ValueError(f"{module.path}: its dora_scale {shapes} is over inputs, which is not supported")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        change, magnitude = formula.prepare(factors), factors[SCALE].reshape(-1, 1)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = change(start, stop, base).add_(base)
            return value.mul_(magnitude[start:stop] / value.norm(dim=1, keepdim=True)).sub_(base)

        return delta

    about = f"{formula.about}, decomposed"
    return Formula(about, prepare, needs_base=True, fixed=formula.fixed, live=formula.live + 1, facts=formula.facts)
