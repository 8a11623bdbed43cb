"""C3A: circulant blocks (Chen et al., https://arxiv.org/abs/2407.19342)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("C3A", prefixes=("c3a_",), fields="block_size block_size_pattern bias")
def c3a(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + C / in; block (m, n) of C is circulant: C[i, j] = k[(j - i) mod b] (peft/tuners/c3a/layer.py)."""
    rows, columns, size = module.require("c3a_kernel", None, None, None)
    if rows * size != module.out_features or columns * size != module.in_features:
        raise ValueError(
            f"{module.path}: c3a_kernel {[rows, columns, size]} does not fit its weight {list(module.weight)}"
        )

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        kernel = factors["c3a_kernel"] / module.in_features
        across = torch.arange(size, device=kernel.device)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            index = torch.arange(start, stop, device=kernel.device)
            shift = (across - index.unsqueeze(1)) % size
            picked = kernel[index // size]
            return picked.gather(2, shift.unsqueeze(1).expand(-1, columns, -1)).flatten(1)

        return delta

    return {"weight": Formula("C3A", prepare, scratch_blocks=5)}
