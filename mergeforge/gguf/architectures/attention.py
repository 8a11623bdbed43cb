"""Query and key projections: llama.cpp wants their rows in another order."""

from __future__ import annotations

from mergeforge.gguf.architectures.row_order import interleave_rope_halves
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult

QUERY = ("q_proj.weight", "q_proj.bias")
KEY = ("k_proj.weight", "k_proj.bias")


def permute_rope_heads(stored: HFTensor) -> RuleResult:
    """Queries and keys of families whose rope llama.cpp computes on adjacent rows (convert_hf_to_gguf.py: permute)."""
    heads = _heads(stored)
    if not heads:
        return None
    stored.rows_per_part(2 * heads)
    return (stored.tensor(rows=interleave_rope_halves(stored.info.rows, heads)),)


def _heads(stored: HFTensor) -> int:
    if stored.name.endswith(QUERY):
        return stored.model.heads
    return stored.model.kv_heads if stored.name.endswith(KEY) else 0
