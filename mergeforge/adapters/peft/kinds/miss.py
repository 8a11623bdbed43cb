"""MiSS (formerly Bone): a small matrix repeated along the inputs (Kang et al., https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("MISS", "BONE", prefixes=("miss_", "bone_"), fields="r miss_dropout mini_r bias")
def miss(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + the block (r, out), transposed and repeated along the inputs; "bat": X + X M + M for blocks X of W.

    "mini" also repeats a block of mini_r columns along the outputs (peft/tuners/miss/layer.py).
    """
    name = "miss_block" if "miss_block" in module.shapes else "bone_block"
    shape = module.require(name)
    if len(shape) == 3:
        return {"weight": _bat(name, shape, module)}
    rank, width = shape
    if module.out_features % width:
        raise ValueError(f"{module.path}: {name} {list(shape)} does not fit its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        block = factors[name].t()
        across = torch.arange(module.in_features, device=block.device) % rank

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            rows = torch.arange(start, stop, device=block.device) % width
            return block[rows][:, across]

        return delta

    return {"weight": Formula("MiSS", prepare, scratch_blocks=3)}


def _bat(name: str, shape: tuple[int, ...], module: AdaptedModule) -> Formula:
    """The "bat" variant; PEFT broadcasts a block's matrix along the outputs, so it only works for square weights."""
    count, rank, _ = shape
    if count * rank != module.in_features or module.in_features != module.out_features:
        raise ValueError(f"{module.path}: {name} {list(shape)} does not fit its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        blocks = factors[name]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            result = torch.empty_like(base)
            for row_block in range(start // rank, -(-stop // rank)):
                rows = slice(max(start, row_block * rank) - start, min(stop, (row_block + 1) * rank) - start)
                inner = slice(rows.start + start - row_block * rank, rows.stop + start - row_block * rank)
                column_blocks = base[rows].view(-1, count, rank)
                result[rows] = (column_blocks @ blocks[row_block] + blocks[row_block][inner].unsqueeze(1)).flatten(1)
            return result

        return delta

    return Formula("MiSS (bat)", prepare, needs_base=True, scratch_blocks=3)
