"""GraLoRA: a LoRA for each block of the weight (Jung et al., https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Config, Delta, Formula, Module, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r hybrid_r alpha gralora_dropout gralora_k fan_in_fan_out bias"


@adapter("GRALORA", prefixes=("gralora_",), fields=_FIELDS)
def gralora(config: Config, module: Module) -> dict[str, Formula]:
    """W + alpha / (r + hybrid_r) * blocks; block (m, n) is (A_n[:, of m] B_m[of n, :])^T, plus a plain LoRA (hybrid).

    Each of the k x k blocks takes r / k of the ranks (peft/tuners/gralora/layer.py, get_delta_weight).
    """
    blocks, inside, rank = module.require("gralora_A", None, None, None)
    module.require("gralora_B", blocks, rank, None)
    if blocks * inside != module.inside or rank % blocks or module.outside % blocks:
        raise ValueError(f"{module.path}: gralora_A {[blocks, inside, rank]} does not fit {list(module.weight)}")
    hybrid = "gralora_A_general" in module.shapes
    scale = float(config["alpha"]) / (rank + int(config.get("hybrid_r") or 0))
    height, part = module.outside // blocks, rank // blocks

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        a, b = factors["gralora_A"] * scale, factors["gralora_B"]
        general = low_rank(factors["gralora_B_general"], factors["gralora_A_general"] * scale) if hybrid else None
        rights = [_right(a, at, part) for at in range(blocks)]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            pieces = []
            for at in range(start // height, -(-stop // height)):
                rows = slice(max(start, at * height) - at * height, min(stop, (at + 1) * height) - at * height)
                left = b[at][:, rows].view(blocks, part, -1)  # of block n: (part, rows)
                pieces.append(torch.einsum("npr,npc->rnc", left, rights[at]).flatten(1))
            result = torch.cat(pieces)
            return result.add_(general(start, stop, base)) if general else result

        return delta

    held = 8 * rank * module.inside * blocks
    return {"weight": Formula("GraLoRA", prepare, fixed=held, live=3, facts={"scale": scale})}


def _right(a: Tensor, at: int, part: int) -> Tensor:
    """(blocks, part, in / blocks): what row block `at` takes of each column block's factor."""
    return a[:, :, at * part : (at + 1) * part].transpose(1, 2).contiguous()
