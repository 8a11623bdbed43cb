"""Log-probabilities of answers without holding all logits at once, for the preference objectives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mergeforge.eval.text_forward import text_body
from mergeforge.train.loop.chunked_loss import IGNORE_INDEX, LossHead, find_head


def install_log_probs(model: PreTrainedModel, *, chunk: int) -> str:
    """Make `model(input_ids, position_ids, labels, segments, segment_count)` return {"log_probs": (segment_count,)}.

    `segments`: for each token the number of the segment (an answer or a prompt) to whose sum its log-probability is
    added. `chunk`: rows of logits at once, 0 for all of them. Returns a note where the model's head cannot be computed
    apart from the model, so that all logits are held at once; "" otherwise.
    """
    head = find_head(model) if chunk else None
    model_forward, body = model.forward, text_body(model)

    @functools.wraps(model_forward)  # generate() and the Trainer read the signature of the model's own forward
    def forward(
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        segment_count: int = 0,
        **inputs: Any,
    ) -> Any:
        if labels is None or segments is None:
            return model_forward(input_ids=input_ids, **inputs)
        targets = labels[:, 1:].reshape(-1)
        is_scored = targets != IGNORE_INDEX
        targets, segments = targets[is_scored], segments[:, 1:].reshape(-1)[is_scored]
        if head is not None:
            states = body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
            rows = states[:, :-1].reshape(-1, states.shape[-1])[is_scored]
            log_probs = _in_chunks(rows, targets, head, chunk)
        else:
            states = model_forward(input_ids=input_ids, use_cache=False, **inputs).logits
            log_probs = _log_probs(states[:, :-1].reshape(-1, states.shape[-1])[is_scored], targets)
        return {"log_probs": _sum_by_segment(log_probs, segments, segment_count) + states.sum() * 0}

    model.forward = forward
    return "" if head is not None or not chunk else "this model's loss cannot be chunked: all logits are held at once"


def _in_chunks(rows: Tensor, targets: Tensor, head: LossHead, chunk: int) -> Tensor:
    """The log-probability of each target; logits are recomputed in the backward pass."""
    parts = [
        checkpoint(_head_log_probs, head, part, targets_of_part, use_reentrant=False)
        for part, targets_of_part in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _head_log_probs(head: LossHead, rows: Tensor, targets: Tensor) -> Tensor:
    return _log_probs(head(rows), targets)


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(logits.float(), targets, reduction="none")


def _sum_by_segment(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums in a fixed order, unlike index_add on a GPU."""
    is_member = segments[None] == torch.arange(count, device=segments.device)[:, None]
    return torch.where(is_member, values[None], 0.0).sum(1)
