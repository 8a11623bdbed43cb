"""GraLoRA: one LoRA per block of the weight (Jung et al., https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r hybrid_r alpha gralora_dropout gralora_k fan_in_fan_out bias"


@adapter("GRALORA", prefixes=("gralora_",), fields=_FIELDS)
def gralora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + alpha / (r + hybrid_r) * blocks; block (m, n) is (A_n[:, of m] B_m[of n, :])^T, plus a plain LoRA (hybrid).

    Each of the k x k blocks uses r / k of the ranks (peft/tuners/gralora/layer.py, get_delta_weight).
    """
    blocks, block_inputs, rank = module.require("gralora_A", None, None, None)
    module.require("gralora_B", blocks, rank, None)
    if blocks * block_inputs != module.in_features or rank % blocks or module.out_features % blocks:
        raise ValueError(
            f"{module.path}: gralora_A {[blocks, block_inputs, rank]} does not fit its weight {list(module.weight)}"
        )
    hybrid = "gralora_A_general" in module.shapes
    scale = float(config["alpha"]) / (rank + int(config.get("hybrid_r") or 0))
    block_rows, block_rank = module.out_features // blocks, rank // blocks

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        a, b = factors["gralora_A"] * scale, factors["gralora_B"]
        general = low_rank(factors["gralora_B_general"], factors["gralora_A_general"] * scale) if hybrid else None
        rights = [_column_factors(a, at, block_rank) for at in range(blocks)]

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            row_blocks = []
            for at in range(start // block_rows, -(-stop // block_rows)):
                rows = slice(
                    max(start, at * block_rows) - at * block_rows, min(stop, (at + 1) * block_rows) - at * block_rows
                )
                left = b[at][:, rows].view(blocks, block_rank, -1)  # of block n: (part, rows)
                row_blocks.append(torch.einsum("npr,npc->rnc", left, rights[at]).flatten(1))
            result = torch.cat(row_blocks)
            return result.add_(general(start, stop, base)) if general else result

        return delta

    nbytes = 8 * rank * module.in_features * blocks
    return {"weight": Formula("GraLoRA", prepare, scratch_nbytes=nbytes, scratch_blocks=3, details={"scale": scale})}


def _column_factors(a: Tensor, row_block: int, block_rank: int) -> Tensor:
    """(blocks, block_rank, in / blocks): the factors of the column blocks for one row block."""
    return a[:, :, row_block * block_rank : (row_block + 1) * block_rank].transpose(1, 2).contiguous()
