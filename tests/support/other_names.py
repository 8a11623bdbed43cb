"""State dicts saved under the names of the class in memory, or without the prefix of the model under the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def dump(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """Save tensors under the names given, tied ones once, with the model's config."""
    stored = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
    folder.mkdir(parents=True)
    save_file({name: tensors[name].clone().contiguous() for name in stored.values()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


def other_names(model: Any, how: str) -> dict[str, torch.Tensor]:
    """A state dict as the class in memory names it, or without the prefix of the model under the head."""
    tensors = dict(model.state_dict())
    if how == "memory":
        return tensors
    inner = model.base_model.state_dict()
    return {
        **inner,
        **{name: value for name, value in tensors.items() if name.split(".")[0] != model.base_model_prefix},
    }
