"""Text through a vision-language class that holds a complete language model, head included, as Llama 4's does.

The class's own forward is not needed for text, and Llama4ForConditionalGeneration's cannot be: transformers 5.24 reads
`image_outputs` from a result that never has it.
"""

from __future__ import annotations

import functools
from typing import Any


def complete_language_model(model: Any) -> Any:
    """The language model with its own head inside of a vision-language model; None for all other models."""
    inner = getattr(model, "language_model", None)
    return inner if getattr(inner, "lm_head", None) is not None else None


def text_body(model: Any) -> Any:
    """The model without its head, from token ids to the last hidden states."""
    return (complete_language_model(model) or model).base_model


def send_text_to_language_model(model: Any) -> None:
    """Replace the forward of a model that holds a complete language model by the latter's. Images are not passed on."""
    inner = complete_language_model(model)
    if inner is None:
        return

    @functools.wraps(model.forward)  # generate() reads the signature
    def forward(input_ids: Any = None, **inputs: Any) -> Any:
        return inner(input_ids=input_ids, **{name: value for name, value in inputs.items() if value is not None})

    model.forward = forward
