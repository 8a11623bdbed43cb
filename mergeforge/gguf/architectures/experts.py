"""Experts: one tensor each, or one per layer; in GGUF always stacked as [experts, rows, columns]."""

from __future__ import annotations

import re

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult

_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
_ONE = re.compile(r"\.experts\.(\d+)\.(w[123]|gate_proj|down_proj|up_proj)\.weight$")
_ALL = re.compile(r"\.experts\.(gate_up_proj|down_proj|gate_proj|up_proj)(\.weight)?$")


def stacked_experts(stored: HFTensor) -> RuleResult:
    """A single expert is a slice of the stacked tensor; a fused gate_up_proj becomes two stacked tensors."""
    if one := _ONE.search(stored.name):
        return _slice(stored, int(one[1]), _PARTS[one[2]])
    if whole := _ALL.search(stored.name):
        return gate_up_halves(stored, "exps") if whole[1] == "gate_up_proj" else _stack(stored, _PARTS[whole[1]])
    return None


def gate_up_halves(stored: HFTensor, experts: str = "") -> RuleResult:
    """Fused gate and up: in each matrix, the first half of the rows is ffn_gate, the second ffn_up."""
    *stack, rows, columns = stored.info.shape
    count = stack[0] if stack else 1
    stored.rows_per_part(2 * count)
    gate, up = deinterleave_qkv(stored.info.rows, count, (rows // 2, rows // 2))
    ending = f"_{experts}" if experts else ""
    shape = (*stack, rows // 2, columns)
    return (
        stored.block_tensor(f"ffn_gate{ending}", shape, rows=gate),
        stored.block_tensor(f"ffn_up{ending}", shape, rows=up),
    )


def _slice(stored: HFTensor, expert: int, part: str) -> RuleResult:
    count = stored.model.experts
    if expert >= count:
        raise SourceError(
            f"{stored.info.name}: but config.json has {count} experts", hint="correct num_experts in config.json"
        )
    shape = (count, *stored.info.shape)
    return (stored.block_tensor(f"ffn_{part}_exps", shape, first_row=expert * stored.info.rows),)


def _stack(stored: HFTensor, part: str) -> RuleResult:
    return (stored.block_tensor(f"ffn_{part}_exps"),)
