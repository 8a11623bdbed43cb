"""TinyLoRA: a few numbers mix fixed random matrices between the weight's largest singular directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout fan_in_fan_out bias"


@adapter("TINYLORA", prefixes=("tinylora_",), fields=_FIELDS)
def tinylora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B (sum_i v_i P_i) A (peft/tuners/tinylora/layer.py). A and B are stored.

    Groups of consecutive modules share a v, and P is drawn again with the module's number if it is not stored.
    """
    rank = module.require("tinylora_A", None, module.in_features)[0]
    module.require("tinylora_B", module.out_features, rank)
    vectors = [role for role in module.shapes if role.startswith("tinylora_v.")]
    stored = "tinylora_P" in module.shapes
    index, weights = (0, [module.weight]) if len(vectors) == 1 and stored else module.order()
    count = len(weights)
    groups = max(1, round(count * (1.0 - float(config.get("weight_tying") or 0.0))))
    vector = vectors[0] if len(vectors) == 1 else f"tinylora_v.{min(index // max(1, count // groups), groups - 1)}"
    (size,) = module.require(vector, None)
    if stored:
        module.require("tinylora_P", size, rank, rank)
    seed = int(config.get("projection_seed", 42)) + index

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        v = factors[vector]
        if stored:
            projections = factors["tinylora_P"]
        else:
            generator = torch.Generator().manual_seed(seed)
            projections = torch.normal(0.0, 1.0 / rank**0.5, (size, rank, rank), generator=generator).to(v)
        middle = torch.einsum("i,ijk->jk", v, projections)
        return low_rank(factors["tinylora_B"] @ middle, factors["tinylora_A"])

    nbytes = 8 * size * rank * rank + 8 * rank * module.out_features
    return {"weight": Formula("TinyLoRA", prepare, scratch_nbytes=nbytes)}
