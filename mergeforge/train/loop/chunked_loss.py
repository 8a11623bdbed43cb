"""Cross-entropy of the labels without holding all logits at once.

Only the rows of a batch that have a label go through lm_head, `chunk` rows at a time, and their logits are recomputed
in the backward pass. For 4096 tokens and a vocabulary of 64,000 the peak is 0.4 GB instead of 3 GB.
The model's own forward method is replaced, so that DDP, FSDP and PEFT wrap the model like any other.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mergeforge.errors import RecipeError
from mergeforge.eval.text_forward import text_body

IGNORE_INDEX = -100
Loss = Callable[[Tensor, Tensor, Any], Tensor]  # logits (n, vocabulary), labels (n), count -> the loss
LossHead = Callable[[Tensor], Tensor]  # hidden states (n, hidden) -> logits (n, vocabulary)


def install_chunked_loss(model: PreTrainedModel, *, chunk: int, custom: Loss | None = None) -> str:
    """Make `model(input_ids, position_ids, labels, num_items_in_batch, loss_weights)` return {"loss": sum / count}.

    `loss_weights`: factors of the labels' losses. `chunk`: rows of logits at once, 0 for all of them. Returns a note
    where the model's head cannot be computed apart from the model, so that all logits are held at once; "" otherwise.
    """
    head = None if custom or not chunk else find_head(model)
    model_forward, body = model.forward, text_body(model)

    @functools.wraps(model_forward)  # generate() and the Trainer read the signature of the model's own forward
    def forward(
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_weights: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None:
            return model_forward(input_ids=input_ids, **inputs)
        targets = labels[:, 1:].reshape(-1)
        is_trained = targets != IGNORE_INDEX
        targets = targets[is_trained]
        weights = None if loss_weights is None else loss_weights[:, 1:].reshape(-1)[is_trained]
        count = num_items_in_batch if num_items_in_batch is not None else max(len(targets), 1)
        if head is not None:
            hidden = body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
            rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[is_trained]
            total = summed_loss_in_chunks(rows, targets, head, chunk, weights)
            return {"loss": total / count + hidden.sum() * 0}
        logits = model_forward(input_ids=input_ids, use_cache=False, **inputs).logits
        rows = logits[:, :-1].reshape(-1, logits.shape[-1])[is_trained]
        loss = custom(rows, targets, count) if custom else summed_loss(rows, targets, weights) / count
        return {"loss": loss + logits.sum() * 0}

    model.forward = forward
    return "" if head is not None or not chunk else "this model's loss cannot be chunked: all logits are held at once"


def summed_loss_in_chunks(
    rows: Tensor, targets: Tensor, head: LossHead, chunk: int, weights: Tensor | None = None
) -> Tensor:
    """The summed cross-entropy of all rows of hidden states. An empty batch gives a zero that is part of the graph."""
    total = rows.sum() * 0.0
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        weights_of_part = None if weights is None else weights[part]
        total = total + checkpoint(_head_loss, head, rows[part], targets[part], weights_of_part, use_reentrant=False)
    return total


def _head_loss(head: LossHead, rows: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    return summed_loss(head(rows), targets, weights)


def summed_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The summed cross-entropy, in float32. `weights`: a factor for each row."""
    if weights is None:
        return cross_entropy(logits.float(), targets, reduction="sum")
    return (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def find_head(model: Any) -> LossHead | None:
    """The function from hidden states to logits, found by comparing candidates with the model's own logits.

    The candidates: lm_head alone, or with the soft cap of Gemma 2, the scale of Cohere, the divisor of Granite. None
    where no candidate matches.
    """
    config = model.config.get_text_config()
    if model.get_output_embeddings() is None or getattr(config, "output_router_logits", False):
        return None
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def lm_head(hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden)  # looked up on every call: an adapter may wrap it later
        return logits

    candidates: list[LossHead] = [lm_head]
    if cap:
        candidates.append(lambda hidden: torch.tanh(lm_head(hidden) / cap) * cap)
    if scale:
        candidates.append(lambda hidden: lm_head(hidden) * scale)
    if divisor:
        candidates.append(lambda hidden: lm_head(hidden) / divisor)
    return next((head for head in candidates if _matches_model(model, head)), None)


@torch.no_grad()
def _matches_model(model: Any, head: LossHead) -> bool:
    """Whether the head turns the model's last hidden states into the model's logits."""
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(1, 9, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        logits = head(text_body(model)(input_ids=ids, use_cache=False).last_hidden_state).float()
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        model.train(training)
    return logits.shape == expected.shape and bool(torch.allclose(logits, expected, rtol=1e-3, atol=1e-3))


def custom_loss(dotted: str | None) -> Loss | None:
    """The function `module.name`. Raises RecipeError where there is none."""
    if dotted is None:
        return None
    module, _, name = dotted.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "write module.function; the module must be importable (PYTHONPATH)"
        raise RecipeError(f"there is no loss function {dotted}: {error}", hint=hint) from None
    if not callable(function):
        raise RecipeError(f"{dotted} is not a function", hint="loss(logits, labels, count) -> the loss")
    loss: Loss = function
    return loss
