"""DeLoRA: normalized rank components with a bound on their strength (Bini et al., https://arxiv.org/abs/2503.18225)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor


@adapter("DELORA", prefixes=("delora_",), fields="r delora_lambda module_dropout rank_pattern lambda_pattern bias")
def delora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B diag(lambda / r / (|A_i| |B_i|)) A * w_norm (peft/tuners/delora/layer.py, _compute_delta)."""
    rank, _ = module.require("delora_A", None, module.in_features)
    module.require("delora_B", module.out_features, rank)
    module.require("delora_w_norm", module.in_features)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        a, b = factors["delora_A"], factors["delora_B"]
        lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        scale = factors["delora_lambda"] / rank / lengths
        return low_rank(b, a * scale.unsqueeze(1) * factors["delora_w_norm"])

    return {"weight": Formula("DeLoRA", prepare, scratch_nbytes=8 * rank * (module.in_features + module.out_features))}
