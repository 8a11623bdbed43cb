"""Buffers: tensors that a model class computes by itself, and that only some versions of transformers store."""

from __future__ import annotations

import re

_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_pos_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|masked_bias"
    r"|position_ids|embeddings\.token_type_ids|relative_position_index|rope\.freqs)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT-2, GPT-J, GPT-Neo, GPT-NeoX: (1, 1, length, length)
_SINUSOIDS = re.compile(r"(^|\.)embed_positions\.weights?$")
_SINUSOIDAL_MODELS = ("marian", "pegasus", "m2m_100", "nllb-moe", "speech_to_text", "xglm", "fsmt")


def is_buffer(name: str, shape: tuple[int, ...], model_type: str = "") -> bool:
    """Whether a tensor is a buffer: frequencies, position ids or masks, which training does not change."""
    if model_type in _SINUSOIDAL_MODELS and _SINUSOIDS.search(name):
        return True
    return bool(_BUFFERS.search(name)) or (len(shape) == 4 and bool(_CAUSAL_MASK.search(name)))
