"""Which fused experts PEFT adapts: parameters that hold all experts of a layer are no modules."""

from __future__ import annotations

from typing import Any

NAMES = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate")  # of experts and routers before they were fused


def expert_names(model: Any) -> set[str]:
    """The module names by which PEFT takes the parameters of fused experts; none for Llama 4 and gpt-oss."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(NAMES))
    convert_peft_config_for_transformers(config, model, None)
    return set(NAMES) - set(config.target_modules or ())
