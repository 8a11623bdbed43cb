"""Projections of queries, keys and values: rows that llama.cpp wants in another order."""

from __future__ import annotations

from mergeforge.gguf.architectures.row_order import paired
from mergeforge.gguf.architectures.tensor_mapping import Answer, Stored

QUERY = ("q_proj.weight", "q_proj.bias")
KEY = ("k_proj.weight", "k_proj.bias")


def paired_heads(stored: Stored) -> Answer:
    """Queries and keys of families whose rope llama.cpp computes on neighbouring rows."""
    heads = _heads(stored)
    if not heads:
        return None
    stored.split_rows(2 * heads)
    return (stored.at(rows=paired(stored.info.rows, heads)),)


def _heads(stored: Stored) -> int:
    if stored.name.endswith(QUERY):
        return stored.model.heads
    return stored.model.kv_heads if stored.name.endswith(KEY) else 0
