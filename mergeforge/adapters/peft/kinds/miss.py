"""MiSS (once called Bone): a small matrix repeated along the inputs (Kang et al., https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("MISS", "BONE", prefixes=("miss_", "bone_"), fields="r miss_dropout mini_r bias")
def miss(config: Config, module: Module) -> dict[str, Formula]:
    """W + the block (r, out), transposed and repeated along the inputs; "bat": X + X M + M for blocks X of W.

    "mini" repeats a block of mini_r columns along the outputs, too (peft/tuners/miss/layer.py).
    """
    name = "miss_block" if "miss_block" in module.shapes else "bone_block"
    shape = module.require(name)
    if len(shape) == 3:
        return {"weight": _bat(name, shape, module)}
    rank, width = shape
    if module.outside % width:
        raise ValueError(f"{module.path}: {name} {list(shape)} does not fit its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        block = factors[name].t()
        across = torch.arange(module.inside, device=block.device) % rank

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            rows = torch.arange(start, stop, device=block.device) % width
            return block[rows][:, across]

        return delta

    return {"weight": Formula("MiSS", prepare, live=3)}


def _bat(name: str, shape: tuple[int, ...], module: Module) -> Formula:
    """PEFT's product broadcasts a block's matrix along the outputs, so it works for square weights alone."""
    count, rank, _ = shape
    if count * rank != module.inside or module.inside != module.outside:
        raise ValueError(f"{module.path}: {name} {list(shape)} does not fit its weight {list(module.weight)}")

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        blocks = factors[name]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            result = torch.empty_like(base)
            for at in range(start // rank, -(-stop // rank)):
                rows = slice(max(start, at * rank) - start, min(stop, (at + 1) * rank) - start)
                inner = slice(rows.start + start - at * rank, rows.stop + start - at * rank)
                pieces = base[rows].view(-1, count, rank)
                result[rows] = (pieces @ blocks[at] + blocks[at][inner].unsqueeze(1)).flatten(1)
            return result

        return delta

    return Formula("MiSS (bat)", prepare, needs_base=True, live=3)
