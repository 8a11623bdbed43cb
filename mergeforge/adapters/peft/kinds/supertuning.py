"""SuperTuning: trained entries of the largest or smallest magnitude, with or without LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "sparsity select_top r lora_alpha lora_dropout save_precomputed_indices"


@adapter("SUPERTUNING", prefixes=("supertuning_",), fields=_FIELDS)
def supertuning(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W[flat index] + value for every stored index, + alpha / r * B A (peft/tuners/supertuning/layer.py)."""
    (count,) = module.require("supertuning_values", None)
    if "supertuning_indices" not in module.shapes:
        reason = "was saved without its indices (save_precomputed_indices), which would take sorting the whole weight"
        raise ValueError(f"{module.path} {reason}; merge it with PEFT")
    module.require("supertuning_indices", count)
    scale = 0.0
    if "supertuning_lora_A" in module.shapes:
        rank, _ = module.require("supertuning_lora_A", None, module.in_features)
        module.require("supertuning_lora_B", module.out_features, rank)
        alpha = config.get("lora_alpha")
        scale = (2 * rank if alpha is None else float(alpha)) / rank

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        places, values = factors["supertuning_indices"].long(), factors["supertuning_values"]
        if not bool((places[1:] >= places[:-1]).all()):
            places, order = places.sort()
            values = values[order]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            edges = torch.tensor([start, stop], device=places.device) * module.in_features
            first, last = torch.searchsorted(places, edges).tolist()
            change = values.new_zeros(stop - start, module.in_features)
            change.view(-1).index_add_(0, places[first:last] - start * module.in_features, values[first:last])
            if scale:
                left, right = factors["supertuning_lora_B"][start:stop], factors["supertuning_lora_A"]
                change.addmm_(left, right, alpha=scale)
            return change

        return delta

    return {"weight": Formula("SuperTuning", prepare, scratch_nbytes=48 * count)}
