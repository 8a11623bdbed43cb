"""Combine several LoRA adapters into one: the weighted sum of their deltas, as factors.

The exact sum concatenates the A of all adapters by rows and their w s B by columns, so the ranks add up. With a
rank or an energy, a QR decomposition of both and the SVD of the small core give the best approximation of that
rank (as PEFT's add_weighted_adapter with `svd`, but without the dense delta). The written adapter has scale 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.keys import KEY_PREFIX
from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.low_rank_svd import Factors, truncate_product
from mergeforge.core.tensor_info import torch_dtype
from mergeforge.errors import SourceError
from mergeforge.io.disk import write_durably
from mergeforge.lora.combine.plan import Combination, LoraSum, Terms, folded_terms, plan_combination, weighted_terms
from mergeforge.lora.combine.report import REPORT, CombinedModule, adapter_card, adapter_config, report_json
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.worker import single_torch_thread
from mergeforge.writers.peft_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SPOOL,
    Spool,
    staged_folder,
    write_peft_adapter,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Combination",
    "CombinedModule",
    "Terms",
    "combine_adapters",
    "folded_terms",
    "plan_combination",
    "weighted_terms",
    "write_combined",
]

FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MODEL_CARD, REPORT)


def write_combined(plan: Combination, folder: Path) -> list[CombinedModule]:
    """Write the adapter's files into an existing folder; returns the rank and error of every module."""
    spool = Spool(folder)
    try:
        with single_torch_thread():
            results = [_write_module(result, plan, spool) for result in plan.sums]
        modules = [result for result in results if result is not None]
        if not modules:
            raise SourceError("the adapters cancel each other out, so there is nothing to write")
        write_peft_adapter(folder, spool.tensors(), adapter_config(plan, modules), adapter_card(plan, modules))
        write_durably(folder / REPORT, report_json(plan, modules))
    finally:
        spool.close()
        (folder / SPOOL).unlink(missing_ok=True)
    return modules


def combine_adapters(plan: Combination, out: Path, *, overwrite: bool = False) -> list[CombinedModule]:
    """Write the adapter to a new folder OUT, which exists, complete, at the end. Raises OutputError."""
    with staged_folder(out, FILES, overwrite=overwrite) as work:
        return write_combined(plan, work)


def _write_module(lora_sum: LoraSum, plan: Combination, spool: Spool) -> CombinedModule | None:
    """Write one module; None if the adapters cancel each other out."""
    import torch

    dtype = torch_dtype(OUT_DTYPES[plan.dtype])
    with torch.inference_mode():
        left, right, factors = _factors(lora_sum, plan)
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise SourceError(f"{lora_sum.module}: the adapters have infinite or NaN values")
        if not right.shape[0]:
            return None
        a, b = (left.t(), right.t()) if lora_sum.transposed else (right, left)
        kind, leaf = ("lora_embedding_", "") if lora_sum.embedding else ("lora_", ".weight")
        spool.add(f"{KEY_PREFIX}{lora_sum.module}.{kind}A{leaf}", a.to(dtype))
        spool.add(f"{KEY_PREFIX}{lora_sum.module}.{kind}B{leaf}", b.to(dtype))
    norm = math.sqrt(factors.squared_norm) if factors else None
    return CombinedModule(lora_sum.module, right.shape[0], lora_sum.rank, factors.tail if factors else 0.0, norm)


def _factors(lora_sum: LoraSum, plan: Combination) -> tuple[Tensor, Tensor, Factors | None]:
    """L (rows, r) and R (r, columns) of the sum; truncated, or compressed if the ranks exceed the matrix's size."""
    import torch

    pairs = [(weight * delta.scale, *delta.read_factors()) for weight, delta in lora_sum.terms]
    lefts, rights = [scale * left for scale, left, _ in pairs], [right for _, _, right in pairs]
    if plan.exact and lora_sum.rank <= min(lora_sum.shape):
        return torch.cat(lefts, dim=1), torch.cat(rights), None
    if not all(bool(factor.isfinite().all()) for factor in (*lefts, *rights)):
        return lefts[0] * math.nan, rights[0], None
    factors = truncate_product(lefts, rights, plan.rank, plan.energy)
    return factors.left, factors.right, factors
