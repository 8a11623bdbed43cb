"""RoAd: outputs rotated in pairs (Liao et al., https://arxiv.org/abs/2409.00119)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("ROAD", prefixes=("road_",), fields="variant group_size init_weights")
def road(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """c * W + s * rot(W), and the same for the bias: rot swaps the halves of each row group and negates the first.

    c = alpha cos theta, s = alpha sin theta (peft/tuners/road/layer.py, _prepare_cols and _apply_road).
    """
    variant, group = str(config.get("variant", "road_1")), int(config.get("group_size", 64))
    numbers = {
        "road_1": module.out_features // 2,
        "road_2": module.out_features,
        "road_4": 2 * module.out_features,
    }.get(variant)
    if numbers is None or module.out_features % group:
        settings = f"variant {variant} with groups of {group} rows"
        raise ValueError(f"{module.path}: {settings} does not fit its weight {list(module.weight)}")
    module.require("road_theta", numbers)
    module.require("road_alpha", numbers)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        keep, cross = _row_coefficients(variant, group, factors["road_theta"], factors["road_alpha"])

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            halves = base.view((stop - start) // group, 2, group // 2, -1)
            rotated = halves.flip(1)
            rotated[:, 0] *= -1
            rotated = rotated.reshape(base.shape).mul_(cross[start:stop].unsqueeze(1))
            return rotated.addcmul_(base, keep[start:stop].unsqueeze(1) - 1)

        return delta

    formula = Formula("RoAd", prepare, needs_base=True, scratch_blocks=3, row_group=group)
    return {"weight": formula, "bias": formula}


def _row_coefficients(variant: str, group: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of each row and of its partner row."""
    if variant == "road_1":
        theta, alpha = (
            values.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for values in (theta, alpha)
        )
    if variant == "road_4":
        angles, scales = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        keep, cross = scales[:, 0] * angles[:, 0].cos(), scales[:, 1] * angles[:, 1].sin()
        return keep.flatten(), cross.flatten()
    return alpha * theta.cos(), alpha * theta.sin()
