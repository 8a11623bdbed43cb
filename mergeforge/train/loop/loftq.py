"""LoftQ for QLoRA: A and B begin as the part of the base that its 4-bit form lost (arXiv 2310.08659, one iteration).

The 4-bit base is not changed, so the adapter folds into it. PEFT's replace_lora_weights_loftq does the same on GPUs
alone, and leaves out that LoRA multiplies B A by alpha / r.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft.tuners.lora import Linear4bit
from safetensors import safe_open
from torch import Tensor

from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor


@torch.no_grad()
def initialize_loftq(adapted: Any, base: Path) -> None:
    """Set A and B of a PeftModel on an NF4 base. `base`: the folder with the 16-bit weights. Raises SourceError."""
    stored = open_checkpoint(base, str(base)).tensors
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, Linear4bit):
            lost = _read(stored.get(f"{name}.weight"), f"{name}.weight", base).to(module.weight.device)
            lost -= bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            _set_factors(module, lost / module.scaling["default"])


def _read(tensor: Any, name: str, base: Path) -> Tensor:
    """A weight in float32. Raises SourceError where the files have no such tensor."""
    if not isinstance(tensor, StoredTensor):
        text = f"lora.init: loftq needs {name} in 16 bit, which {base} does not have"
        raise SourceError(text, hint="set init: default")
    with safe_open(tensor.file.path, framework="pt") as file:
        weight: Tensor = file.get_tensor(tensor.info.name)
    return weight.float()


def _set_factors(module: Any, delta: Tensor) -> None:
    """Let B A be the best approximation of `delta` that the rank allows."""
    rank = module.r["default"]
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    roots = values[:rank].sqrt()
    module.lora_A["default"].weight.data = roots[:, None] * right[:rank]
    module.lora_B["default"].weight.data = left[:, :rank] * roots
