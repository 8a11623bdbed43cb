"""RoAd: outputs rotated in pairs (Liao et al., https://arxiv.org/abs/2409.00119)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("ROAD", prefixes=("road_",), fields="variant group_size init_weights")
def road(config: Config, module: Module) -> dict[str, Formula]:
    """c * W + s * rot(W): rot swaps the halves of each group of rows and negates the first; the bias with it.

    c = alpha cos theta, s = alpha sin theta (peft/tuners/road/layer.py, _prepare_cols and _apply_road).
    """
    variant, group = str(config.get("variant", "road_1")), int(config.get("group_size", 64))
    numbers = {"road_1": module.outside // 2, "road_2": module.outside, "road_4": 2 * module.outside}.get(variant)
    if numbers is None or module.outside % group:
        what = f"variant {variant} with groups of {group} rows"
        raise ValueError(f"{module.path}: {what} does not fit its weight {list(module.weight)}")
    module.require("road_theta", numbers)
    module.require("road_alpha", numbers)

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        keep, cross = _columns(variant, group, factors["road_theta"], factors["road_alpha"])

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            halves = base.view((stop - start) // group, 2, group // 2, -1)
            turned = halves.flip(1)
            turned[:, 0] *= -1
            turned = turned.reshape(base.shape).mul_(cross[start:stop].unsqueeze(1))
            return turned.addcmul_(base, keep[start:stop].unsqueeze(1) - 1)

        return delta

    formula = Formula("RoAd", prepare, needs_base=True, live=3, reach=group)
    return {"weight": formula, "bias": formula}


def _columns(variant: str, group: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """What each row keeps of itself, and takes of its partner."""
    if variant == "road_1":
        theta, alpha = (one.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for one in (theta, alpha))
    if variant == "road_4":
        angles, scales = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        keep, cross = scales[:, 0] * angles[:, 0].cos(), scales[:, 1] * angles[:, 1].sin()
        return keep.flatten(), cross.flatten()
    return alpha * theta.cos(), alpha * theta.sin()
