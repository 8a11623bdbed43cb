"""VB-LoRA: factors composed from a bank of vectors (Li et al., https://arxiv.org/abs/2405.15179)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = (
    "r num_vectors vector_length topk vblora_dropout fan_in_fan_out bias init_vector_bank_bound init_logits_std "
    "save_only_topk_weights"
)


@adapter("VBLORA", prefixes=("vblora_",), fields=_FIELDS)
def vblora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B A, whose subvectors are softmax-weighted means of the top-k vectors of the bank.

    The file has either all logits, or the top-k indices and all but the last of their weights, which is 1 minus
    the sum of the others (peft/tuners/vblora/layer.py; save_only_topk_weights).
    """
    _, length = module.require("vblora_vector_bank", None, None)
    slim = "vblora_logits_A_topk_indices" in module.shapes
    tail = "_topk_indices" if slim else ""
    rank, tiles = module.require(f"vblora_logits_A{tail}")[:2]
    rows = module.require(f"vblora_logits_B{tail}")[0]
    if tiles * length != module.in_features or rows * length != module.out_features:
        raise ValueError(f"{module.path}: {tiles} and {rows} vectors of {length} do not make {list(module.weight)}")
    count = int(config.get("topk", 2))

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        bank = factors["vblora_vector_bank"]
        a, b = (_compose_from_bank(factors, f"vblora_logits_{side}", bank, count, slim) for side in "AB")
        return low_rank(b.transpose(1, 2).reshape(module.out_features, rank), a.reshape(rank, module.in_features))

    nbytes = 4 * (2 + count) * rank * (module.in_features + module.out_features)
    return {"weight": Formula("VB-LoRA", prepare, scratch_nbytes=nbytes)}


def _compose_from_bank(factors: Mapping[str, Tensor], name: str, bank: Tensor, count: int, slim: bool) -> Tensor:
    import torch

    if slim:
        indices, first = factors[f"{name}_topk_indices"].long(), factors[f"{name}_topk_weights"]
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], dim=-1)
    else:
        logits, indices = factors[name].topk(count, dim=-1)
        weights = logits.softmax(-1)
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)
