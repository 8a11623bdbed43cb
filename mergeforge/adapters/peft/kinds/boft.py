"""BOFT: rotations as a product of butterfly factors (Liu et al., https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter
from mergeforge.adapters.peft.kinds.oft import cayley, rotation_delta

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout fan_in_fan_out bias"


@adapter("BOFT", prefixes=("boft_",), fields=_FIELDS)
def boft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """s * W R^T with block-diagonal orthogonal R and one butterfly factor (peft/tuners/boft/layer.py)."""
    butterflies, blocks, size, _ = module.require("boft_R", None, None, None, None)
    if butterflies != 1:
        raise ValueError(f"{module.path}: BOFT with {butterflies} butterfly factors is not supported, only one")
    if blocks * size != module.in_features:
        raise ValueError(
            f"{module.path}: boft_R {list(module.shapes['boft_R'])} does not fit its weight {list(module.weight)}"
        )
    scaled = module.shapes.get("boft_s") is not None

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        raw = factors["boft_R"][0]
        rotation = rotation_delta(cayley(0.5 * (raw - raw.transpose(1, 2))))
        if not scaled:
            return rotation
        scale = factors["boft_s"].flatten().unsqueeze(1)
        return lambda start, stop, base: rotation(start, stop, base).add_(base).mul_(scale[start:stop]).sub_(base)

    return {
        "weight": Formula("BOFT", prepare, needs_base=True, scratch_nbytes=16 * blocks * size * size, scratch_blocks=3)
    }
