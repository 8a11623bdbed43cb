"""AdaLoRA: an SVD-like LoRA whose rank was pruned (Zhang et al., https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_OWN = "r lora_alpha init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step rank_pattern bias"
_UNUSED = "lora_dropout fan_in_fan_out init_lora_weights megatron_core qalora_group_size"


@adapter("ADALORA", prefixes=("lora_",), fields=f"{_OWN} {_UNUSED}")
def adalora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B (A * E) * alpha / (init_r + 1e-5).

    The divisor stays init_r after pruning, and alpha is not divided by r (peft/tuners/adalora/layer.py,
    SVDLinear.get_delta_weight).
    """
    rank = module.require("lora_E", None, 1)[0]
    module.require("lora_A", rank, module.in_features)
    module.require("lora_B", module.out_features, rank)
    alpha = config.get("lora_alpha") or config["r"]
    scale = alpha / (config["init_r"] + 1e-5)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        return low_rank(factors["lora_B"], factors["lora_A"] * factors["lora_E"] * scale)

    return {"weight": Formula("AdaLoRA", prepare, details={"scale": scale})}
