"""The order in which a model's class defines its modules, where an adapter's file numbers them by it.

Checkpoints do not tell this order, so transformers builds the model without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def module_order(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The modules in the order of the class that config.json names. Raises ValueError where that is unknown."""
    try:
        import torch
        import transformers
    except ImportError:
        reason = "its tensors are numbered in the order of the model's modules, and transformers, which knows it,"
        raise ValueError(f"{reason} is not installed; install transformers") from None
    name = str((config.get("architectures") or [""])[0])
    model_class = getattr(transformers, name, None)
    if model_class is None:
        reason = "its tensors are numbered in the order of the model's modules, and transformers has no class"
        raise ValueError(f"{reason} {name or 'for it (config.json names no architecture)'}")
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(dict(config)))
    places = {path: at for at, (path, _) in enumerate(model.named_modules())}
    if unknown := [module for module in modules if module not in places]:
        raise ValueError(
            f"its tensors are numbered in the order of the model's modules, and {name} has no {unknown[0]}"
        )
    return sorted(modules, key=lambda module: places[module])
