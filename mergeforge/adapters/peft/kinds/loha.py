"""LoHa: the Hadamard product of two low-rank matrices (Hyeon-Woo et al., https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, pattern_value

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r alpha rank_pattern alpha_pattern rank_dropout module_dropout use_effective_conv2d"


@adapter("LOHA", prefixes=("hada_",), fields=_FIELDS)
def loha(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + alpha / r * (w1_a w1_b) * (w2_a w2_b); for convolutions, with a core: t x w_b x w_a (Tucker).

    peft/tuners/loha/layer.py, make_weight and make_weight_cp.
    """
    rank = module.require("hada_w1_b")[0]
    scale = pattern_value(config, "alpha_pattern", "alpha", module.path) / rank
    cores = "hada_t1" in module.shapes
    for number in "12" if cores else "":
        module.require(f"hada_w{number}_a", rank, module.out_features)
        module.require(f"hada_w{number}_b", rank, module.weight[1])
        core = module.require(f"hada_t{number}")
        if core[:2] != (rank, rank) or prod(core[2:]) != prod(module.weight[2:]):
            raise ValueError(
                f"{module.path}: hada_t{number} {list(core)} does not fit its weight {list(module.weight)}"
            )
    if not cores:
        for number in "12":
            module.require(f"hada_w{number}_a", None, rank)
            module.require(f"hada_w{number}_b", rank, None)
        if module.shapes["hada_w1_a"][0] * module.shapes["hada_w1_b"][1] != module.out_features * module.in_features:
            module.require("hada_w1_a", module.out_features, rank)
            module.require("hada_w1_b", rank, module.in_features)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        products = [_hadamard_factor(factors, number, cores) for number in "12"]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            (left_1, right_1), (left_2, right_2) = products
            return (left_1[start:stop] @ right_1).mul_(left_2[start:stop] @ right_2).mul_(scale)

        return delta

    nbytes = sum(4 * module.shapes[f"hada_w{number}_b"][0] * module.in_features for number in "12") if cores else 0
    return {"weight": Formula("LoHa", prepare, scratch_nbytes=nbytes, scratch_blocks=3, details={"scale": scale})}


def _hadamard_factor(factors: Mapping[str, Tensor], number: str, cores: bool) -> tuple[Tensor, Tensor]:
    """The factors (out, r) and (r, in) of one of the two products."""
    a, b = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    if not cores:
        return a, b
    core = factors[f"hada_t{number}"]  # (r, r, *kernel); a is (r, out), b (r, in)
    spread = (b.t() @ core.transpose(0, 1).reshape(len(b), -1)).view(b.shape[1], core.shape[0], -1)
    return a.t(), spread.permute(1, 0, 2).reshape(core.shape[0], b.shape[1] * prod(core.shape[2:]))
