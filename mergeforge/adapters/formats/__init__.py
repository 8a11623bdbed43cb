"""Adapters in other dialects than PEFT's, each turned into what matching.py reads: PEFT's names and LoRA's settings.

mlx         a folder with adapter_config.json and adapters.safetensors (mlx-lm)
diffusion   a single file: kohya's and LyCORIS' names with '_' for '.', diffusers' with a component in front
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.adapters.peft.kind import Kind
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class Translated:
    """An adapter's tensors under names that keys.py knows, the scale of every module, and notes for the plan.

    `kind`: what LyCORIS has beside LoRA, which reads `config`.
    """

    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, float]
    kind: Kind | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> LoraSettings:
        return LoraSettings(0, 0.0, {}, {}, False, False, False, (), None, False, scales=self.scales)
