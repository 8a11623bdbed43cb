"""LoRA's output added in place to that of its base module, without further tensors of its size.

PEFT computes base(x) + B(A(x)) * scaling with four tensors of the size of the output. Here one matrix product adds
B(A(x)) * scaling into base(x), which takes less memory and time. Results differ from PEFT's by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

Forward = Callable[..., Tensor]


def add_in_place(model: nn.Module) -> int:
    """Give plain LoRA modules a forward that adds in place; returns how many. All others keep PEFT's."""
    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_plain(module)]
    for layer in layers:
        layer.forward = _forward(layer)  # type: ignore[method-assign]
    return len(layers)


def _is_plain(layer: LoraLinear) -> bool:
    """Whether it is one adapter without dropout, bias and variants (DoRA, ...) on an unquantized module."""
    if len(layer.active_adapters) != 1 or type(layer.base_layer) is not nn.Linear:
        return False
    (name,) = layer.active_adapters
    has_extras = name in getattr(layer, "lora_variant", {}) or layer.lora_B[name].bias is not None
    return not has_extras and isinstance(layer.lora_dropout[name], nn.Identity)


def _forward(layer: LoraLinear) -> Forward:
    (name,) = layer.active_adapters
    separate: Forward = layer.forward
    base: Any = layer.base_layer

    def forward(inputs: Tensor, *arguments: Any, **options: Any) -> Tensor:
        weights: tuple[Any, Any] = layer.lora_A[name].weight, layer.lora_B[name].weight
        down, up = weights
        usual = not (arguments or options or layer.disable_adapters or layer.merged)
        same = inputs.dtype == down.dtype == base.weight.dtype
        whole = type(layer.lora_A[name]) is nn.Linear and inputs.device.type == "cpu"  # not sharded, as FSDP does
        if not (usual and same and whole and layer.active_adapters == [name]) or torch.is_autocast_enabled("cpu"):
            return separate(inputs, *arguments, **options)
        rows = inputs.reshape(-1, inputs.shape[-1])
        result: Tensor = base(rows)
        result = result.addmm_(rows @ down.t(), up.t(), alpha=layer.scaling[name])
        return result.view(*inputs.shape[:-1], result.shape[-1])

    return forward
