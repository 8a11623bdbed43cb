"""Trainable tokens: some rows of the embedding, trained as they are."""

from __future__ import annotations

from mergeforge.adapters.peft.kind import Config, Formula, Module, adapter


@adapter("TRAINABLE_TOKENS", prefixes=("trainable_tokens_layers",), fields="token_indices")
def trainable_tokens(config: Config, module: Module) -> dict[str, Formula]:
    """The rows of token_indices take the place of the base's (read as LoRA's trainable tokens are)."""
    return {}
