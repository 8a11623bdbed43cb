"""Scaled rotary positions in a config.json: a model that reads longer texts than it was trained on.

The keys are transformers' (modeling_rope_utils.py): `rope_parameters` since version 5, `rope_scaling` before it. Of
several kinds of layers, as in Gemma 3, those with full attention are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
FULL_ATTENTION = "full_attention"
ROPE_TYPES = ("linear", "yarn", "llama3")
LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's
WITH_ORIGINAL_LENGTH = ("yarn", "llama3")  # types that state the length before scaling


@dataclass(frozen=True)
class RopeScaling:
    """How positions are scaled: `factor` times as many as the model was trained on."""

    type: str
    factor: float

    def __str__(self) -> str:
        return f"{self.type}, factor {self.factor:g}"

    def longest(self, positions: int) -> int:
        """The positions of a model that had `positions` before."""
        return int(positions * self.factor)

    def parameters(self, positions: int) -> dict[str, Any]:
        """The entries of transformers' rope parameters for a model of `positions` positions."""
        entries: dict[str, Any] = {"rope_type": self.type, "factor": float(self.factor)}
        if self.type in WITH_ORIGINAL_LENGTH:
            entries["original_max_position_embeddings"] = positions
        return entries | (LLAMA3_FACTORS if self.type == "llama3" else {})


def scale_positions(config: Mapping[str, Any], scaling: RopeScaling, positions: int) -> dict[str, Any]:
    """A config.json with scaled positions, in the style that it has. `positions`: of the model before."""
    text = _text_part(config)
    entries, stored = scaling.parameters(positions), text.get("rope_parameters")
    changed: dict[str, Any] = {"max_position_embeddings": scaling.longest(positions)}
    if not isinstance(stored, Mapping):
        changed["rope_scaling"] = entries
    elif isinstance(stored.get(FULL_ATTENTION), Mapping):
        changed["rope_parameters"] = {**stored, FULL_ATTENTION: {**stored[FULL_ATTENTION], **entries}}
    else:
        changed["rope_parameters"] = {**stored, **entries}
    return _with_text(config, {**text, **changed})


def with_positions_of(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the rotary positions of another one."""
    text, source = _text_part(config), _text_part(other)
    if not any(key in source for key in ROPE_KEYS):
        return dict(config)
    kept = {key: value for key, value in text.items() if key not in ROPE_KEYS}
    return _with_text(config, kept | {key: source[key] for key in ROPE_KEYS if key in source})


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _with_text(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    return dict(text) if _text_part(config) is config else {**config, "text_config": dict(text)}
