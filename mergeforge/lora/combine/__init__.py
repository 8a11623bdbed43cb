"""Several LoRA adapters as one: the weighted sum of their deltas, kept as factors.

Exactly, A holds all adapters' A one below the other and B their w s B side by side, so the ranks add
up. With a rank or an energy, QR of both stacks and the SVD of the small core cut the sum to its best
approximation of that rank (as PEFT's add_weighted_adapter with `svd`, without the dense delta). The
scale of what is written is 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.low_rank_svd import Factors, cut_product
from mergeforge.core.tensor_info import torch_dtype
from mergeforge.errors import SourceError
from mergeforge.io.disk import write_durably
from mergeforge.lora.combine.plan import Join, Sum, Terms, folded_terms, plan_join, weighted_terms
from mergeforge.lora.combine.report import REPORT, Joined, adapter_card, adapter_config, report_json
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.budget import one_torch_thread
from mergeforge.writers.peft_adapter import CARD, CONFIG, SPOOL, WEIGHTS, Spool, new_folder, write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Join", "Joined", "Terms", "folded_terms", "join_adapters", "plan_join", "weighted_terms", "write_joined"]

FILES = (WEIGHTS, CONFIG, CARD, REPORT)
PREFIX = "base_model.model."


def write_joined(plan: Join, folder: Path) -> list[Joined]:
    """Write the adapter's files into a folder that exists; every module with its rank and error."""
    spool = Spool(folder)
    try:
        with one_torch_thread():
            done = [_joined(one, plan, spool) for one in plan.sums]
        found = [one for one in done if one is not None]
        if not found:
            raise SourceError("the adapters cancel each other: there is no sum to write")
        write_adapter(folder, spool.parts(), adapter_config(plan, found), adapter_card(plan, found))
        write_durably(folder / REPORT, report_json(plan, found))
    finally:
        spool.close()
        (folder / SPOOL).unlink(missing_ok=True)
    return found


def join_adapters(plan: Join, out: Path, *, overwrite: bool = False) -> list[Joined]:
    """The same into a new folder OUT, which is there, and whole, at the end. Raises OutputError."""
    with new_folder(out, FILES, overwrite=overwrite) as work:
        return write_joined(plan, work)


def _joined(one: Sum, plan: Join, spool: Spool) -> Joined | None:
    """Write one module; None where the adapters cancel each other."""
    import torch

    dtype = torch_dtype(OUT_DTYPES[plan.dtype])
    with torch.inference_mode():
        left, right, factors = _factors(one, plan)
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise SourceError(f"{one.module}: the adapters hold infinite or NaN values")
        if not right.shape[0]:
            return None
        a, b = (left.t(), right.t()) if one.transposed else (right, left)
        kind, leaf = ("lora_embedding_", "") if one.embedding else ("lora_", ".weight")
        spool.add(f"{PREFIX}{one.module}.{kind}A{leaf}", a.to(dtype))
        spool.add(f"{PREFIX}{one.module}.{kind}B{leaf}", b.to(dtype))
    norm = math.sqrt(factors.square) if factors else None
    return Joined(one.module, right.shape[0], one.rank, factors.tail if factors else 0.0, norm)


def _factors(one: Sum, plan: Join) -> tuple[Tensor, Tensor, Factors | None]:
    """L (rows, r) and R (r, columns) of the sum; cut, or where the ranks exceed the matrix, compressed."""
    import torch

    pairs = [(weight * edit.scale, *edit.plain_factors()) for weight, edit in one.terms]
    lefts, rights = [scale * left for scale, left, _ in pairs], [right for _, _, right in pairs]
    if plan.exact and one.rank <= min(one.shape):
        return torch.cat(lefts, dim=1), torch.cat(rights), None
    if not all(bool(part.isfinite().all()) for part in (*lefts, *rights)):
        return lefts[0] * math.nan, rights[0], None
    factors = cut_product(lefts, rights, plan.rank, plan.energy)
    return factors.left, factors.right, factors
