"""What tensor names say about a model: embeddings, heads, transposed weights."""

from __future__ import annotations

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


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS
