"""Mistral 3 and Ministral 3, alone or as the text part of a vision model."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.llama import like_llama, llama_keys
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.key_values import Value, f32


@architecture("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM")
def mistral3(model: HFModel) -> GGUFModelSpec:
    kind = model.find("model_type")
    if kind == "mistral4":
        raise SourceError("config.json: Mistral 4 cannot be written as GGUF yet", hint="write safetensors")
    keys = llama_keys(model)
    return like_llama(model, "mistral3", keys | _ministral_rope(model) if kind == "ministral3" else keys)


def _ministral_rope(model: HFModel) -> dict[str, Value]:
    rope = model.rope
    for key in ("mscale_all_dim", "llama_4_scaling_beta"):
        if rope.get("rope_type") != "yarn" or rope.get(key) is None:
            raise SourceError(
                f"config.json: a Ministral 3 needs yarn rope_parameters with '{key}'",
                hint="copy them from the base model",
            )
    return {
        "rope.scaling.yarn_log_multiplier": f32(rope["mscale_all_dim"]),
        "attention.temperature_scale": f32(rope["llama_4_scaling_beta"]),
    }
