"""Trainable tokens: fully trained rows of the embedding."""

from __future__ import annotations

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Formula, adapter


@adapter("TRAINABLE_TOKENS", prefixes=("trainable_tokens_layers",), fields="token_indices")
def trainable_tokens(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """The rows of token_indices replace the base's (match.py handles them, as LoRA's trainable tokens)."""
    return {}
