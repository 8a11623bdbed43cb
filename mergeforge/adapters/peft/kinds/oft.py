"""OFT: inputs rotated block by block (Qiu et al., https://arxiv.org/abs/2306.07280; v2: 2506.19847)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = (
    "r oft_block_size module_dropout fan_in_fan_out bias coft eps block_share use_cayley_neumann "
    "num_cayley_neumann_terms rank_pattern alpha_pattern"
)


@adapter("OFT", prefixes=("oft_",), fields=_FIELDS)
def oft(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W_j R_j^T for each block j of columns; R_j is orthogonal, made from a skew-symmetric Q_j.

    oft_R holds Q's upper triangles (peft/tuners/oft/layer.py, OFTRotationModule).
    """
    if config.get("oft_block_size") is None or "oft_embedding_R" in module.shapes:
        raise ValueError(f"{module.path}: OFT of embeddings, or saved by PEFT before 0.16, is not supported")
    if len(module.weight) > 2 and prod(module.weight[2:]) > 1:
        reason = "PEFT trains OFT on sums of overlapping patches, which no convolution kernel can represent"
        raise ValueError(f"{module.path} is a convolution with weight {list(module.weight)}: {reason}")
    blocks, numbers = module.require("oft_R")
    size = round((1 + sqrt(1 + 8 * numbers)) / 2)
    if size * (size - 1) // 2 != numbers or module.in_features % size or blocks not in (1, module.in_features // size):
        raise ValueError(f"{module.path}: oft_R {[blocks, numbers]} does not fit its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        skew = _skew(factors["oft_R"], size)
        if config.get("coft"):
            limit = float(config.get("eps", 6e-5)) / sqrt(blocks)
            norms = skew.norm(dim=(1, 2), keepdim=True)
            skew = skew * (limit / norms).clamp(max=1).nan_to_num(1.0)
        rotation = (
            _neumann(skew, int(config.get("num_cayley_neumann_terms", 5))) if _uses_neumann(config) else cayley(skew)
        )
        return rotation_delta(rotation.expand(module.in_features // size, -1, -1))

    nbytes = 4 * 4 * blocks * size * size
    return {"weight": Formula("OFT", prepare, needs_base=True, scratch_nbytes=nbytes, scratch_blocks=3)}


def rotation_delta(turns: Tensor) -> Delta:
    """W' - W for blocks of columns times the transposes of `turns` (blocks, size, size)."""
    import torch

    count, size, _ = turns.shape

    def delta(start: int, stop: int, base: Tensor) -> Tensor:
        parts = base.view(-1, count, size)
        turned: Tensor = torch.einsum("njk,jik->nji", parts, turns)
        return turned.reshape(base.shape).sub_(base)

    return delta


def cayley(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 of each skew-symmetric Q."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    solved: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return solved


def _uses_neumann(config: Config) -> bool:
    return config.get("use_cayley_neumann") is not False


def _skew(numbers: Tensor, size: int) -> Tensor:
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper = numbers.new_zeros(len(numbers), size, size)
    upper[:, rows, columns] = numbers
    return upper - upper.transpose(1, 2)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q^2 + ... + Q^last: PEFT's series for the Cayley transform; the last power is max(3, terms - 1)."""
    import torch

    last = max(3, terms - 1) if terms > 2 else terms - 1
    result = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).repeat(len(skew), 1, 1)
    power = result.clone()
    for degree in range(1, last + 1):
        power = power @ skew
        result += power if degree == last and terms > 2 else 2 * power
    return result
