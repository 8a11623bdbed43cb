"""LoRA added in place, against PEFT's own forward: outputs, gradients, and what keeps PEFT's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from mergeforge.train.loop.lora_forward import add_in_place


def model(**options: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    adapted = peft.get_peft_model(layers, peft.LoraConfig(r=4, target_modules=["0", "2"], **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


def outputs_and_gradients(adapted: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    result = adapted(inputs)
    result.square().sum().backward()
    return [result, inputs.grad, *(one.grad for one in adapted.parameters() if one.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_outputs_and_gradients_equal_pefts(options: dict[str, Any]) -> None:
    plain, in_place, inputs = model(**options), model(**options), torch.randn(2, 5, 16)
    assert add_in_place(in_place) == 2
    pairs = zip(outputs_and_gradients(plain, inputs), outputs_and_gradients(in_place, inputs), strict=True)
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_modules_keep_pefts_forward(options: dict[str, Any]) -> None:
    assert add_in_place(model(**options)) == 0


def test_a_disabled_adapter_is_not_added() -> None:
    adapted, inputs = model(), torch.randn(3, 16)
    add_in_place(adapted)
    with adapted.disable_adapter():
        base = adapted(inputs)
    assert torch.equal(base, adapted.unload()(inputs))
