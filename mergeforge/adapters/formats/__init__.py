"""Adapter formats other than PEFT's, each converted to what match.py reads: PEFT's names and LoRA's settings.

mlx               a folder with adapter_config.json and adapters.safetensors (mlx-lm)
kohya_diffusers   a single file with kohya's or LyCORIS' names ('_' for '.'), or diffusers' (component first)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.adapters.peft.kind import PeftMethod
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class ConvertedAdapter:
    """An adapter's tensors under names that peft/keys.py knows, the scale of every module, and notes for the plan.

    `method`: LyCORIS for its methods other than LoRA; it reads `config`. `aliases`: tensors that the base stores as
    rows of other tensors.
    """

    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, float]
    method: PeftMethod | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[LoadedSlice, ...]] = field(default_factory=dict)

    @property
    def settings(self) -> LoraSettings:
        return LoraSettings(0, 0.0, {}, {}, False, False, False, (), None, False, scales=self.scales)
