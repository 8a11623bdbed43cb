"""Cross-entropy of the labels without ever holding all logits.

Of a batch only the rows that have a label go through lm_head, `chunk` rows at a time, and their logits are computed
again in the backward pass. For 4096 tokens and a vocabulary of 64,000 that is 0.4 GB at the peak instead of 3 GB.
The forward method of the model itself is replaced, so that DDP, FSDP and PEFT wrap it as they wrap any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mergeforge.errors import RecipeError

IGNORE_INDEX = -100
Loss = Callable[[Tensor, Tensor, Any], Tensor]  # logits (n, vocabulary), labels (n), count -> the loss
LossHead = Callable[[Tensor], Tensor]


def install_chunked_loss(model: PreTrainedModel, *, chunk: int, custom: Loss | None = None) -> str:
    """Make `model(input_ids, position_ids, labels, num_items_in_batch)` give {"loss": sum / count}.

    `chunk`: rows of logits at once, 0 for all of them. Returns a note where the model's head is one that cannot be
    taken apart, so that all logits are held; "" otherwise.
    """
    head = None if custom or not chunk else find_head(model)
    stock = model.forward

    def forward(
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **given: Any,
    ) -> Any:
        if labels is None:
            return stock(input_ids=input_ids, **given)
        targets = labels[:, 1:].reshape(-1)
        trained = targets != IGNORE_INDEX
        targets = targets[trained]
        count = num_items_in_batch if num_items_in_batch is not None else max(len(targets), 1)
        if head is not None:
            hidden = model.base_model(input_ids=input_ids, use_cache=False, **given).last_hidden_state
            rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[trained]
            return {"loss": _in_chunks(rows, targets, head, chunk) / count + hidden.sum() * 0}
        logits = stock(input_ids=input_ids, use_cache=False, **given).logits
        rows = logits[:, :-1].reshape(-1, logits.shape[-1])[trained]
        loss = custom(rows, targets, count) if custom else _summed_loss(rows, targets) / count
        return {"loss": loss + logits.sum() * 0}

    model.forward = forward
    return "" if head is not None or not chunk else "its logits are held whole"


def _in_chunks(rows: Tensor, targets: Tensor, head: LossHead, chunk: int) -> Tensor:
    """The sum over all rows; an empty batch gives a zero that has no gradient but a graph."""
    total = rows.sum() * 0.0
    for at in range(0, len(rows), chunk):
        part, wanted = rows[at : at + chunk], targets[at : at + chunk]
        total = total + checkpoint(_head_loss, head, part, wanted, use_reentrant=False)
    return total


def _head_loss(head: LossHead, rows: Tensor, targets: Tensor) -> Tensor:
    return _summed_loss(head(rows), targets)


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")


def find_head(model: Any) -> LossHead | None:
    """Hidden states -> logits, found by trying; None where no known form gives the model's own logits.

    lm_head alone, or with the soft cap of Gemma 2, the scale of Cohere, the divisor of Granite.
    """
    config = model.config.get_text_config()
    if model.get_output_embeddings() is None or getattr(config, "output_router_logits", False):
        return None
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def lm_head(hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden)  # asked for anew: an adapter may wrap it later
        return logits

    forms: list[LossHead] = [lm_head]
    if cap:
        forms.append(lambda hidden: torch.tanh(lm_head(hidden) / cap) * cap)
    if scale:
        forms.append(lambda hidden: lm_head(hidden) * scale)
    if divisor:
        forms.append(lambda hidden: lm_head(hidden) / divisor)
    return next((form for form in forms if _returns_full_logits(model, form)), None)


@torch.no_grad()
def _returns_full_logits(model: Any, form: LossHead) -> bool:
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(1, 9, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = form(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        model.train(training)
    return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3))


def custom_loss(dotted: str | None) -> Loss | None:
    """The function `module.name`. Raises RecipeError where there is none."""
    if dotted is None:
        return None
    module, _, name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "write module.function; its module must be importable (PYTHONPATH)"
        raise RecipeError(f"there is no loss {dotted}: {error}", hint=hint) from None
    if not callable(found):
        raise RecipeError(f"{dotted} is not a function", hint="loss(logits, labels, count) -> the loss")
    checked: Loss = found
    return checked
