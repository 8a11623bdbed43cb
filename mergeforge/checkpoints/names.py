"""What names say about a model: its class, embeddings, heads, transposed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = ("lm_head", "embed_out", "output_layer")  # output embeddings that may be tied to the input embedding
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "embeddings",
    "shared",
    "token_embedding",
)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # weights are stored as (in, out)


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names under `architectures`; none if it is malformed."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS
