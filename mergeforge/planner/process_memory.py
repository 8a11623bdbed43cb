"""The memory of the whole process that runs a plan: the working memory, and what Python and its libraries take.

The working memory (Plan.peak) is proved from shapes. The rest is measured: what this process takes now, with the
headers and tokenizers of the plan in it, and what it grows by (tests/execute/test_memory_promise.py).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mergeforge.tensors.budget import resident_memory

if TYPE_CHECKING:
    from mergeforge.planner.plan import Plan

TORCH_NBYTES = 190 << 20  # importing torch 2.13 (CPU) on x86-64
GROWTH_NBYTES = 24 << 20  # modules, threads, malloc, the receipt
TORCH_GROWTH_NBYTES = 36 << 20  # its threads and kernels


def library_memory(plan: Plan) -> int:
    """Bytes that the interpreter and the libraries take while the plan runs, at most."""
    growth = GROWTH_NBYTES
    if plan.needs_torch or plan.combination:
        growth += TORCH_GROWTH_NBYTES + (0 if "torch" in sys.modules else TORCH_NBYTES)
    return resident_memory() + growth


def process_memory(plan: Plan) -> int:
    """The most memory in bytes that this process takes if it runs the plan."""
    return plan.peak + library_memory(plan)
