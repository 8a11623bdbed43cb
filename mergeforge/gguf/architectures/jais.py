"""JAIS: GPT-2 with a gate, ALiBi, and scales of the embedding and the output folded into their weights."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.gpt2 import transposed
from mergeforge.gguf.architectures.hparams import FILE_TYPE
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import DECODER, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import f32, u32

_ALIBI_BIAS = 8.0  # what the slopes of JAIS are computed from


@architecture("JAISLMHeadModel")
def jais(model: HFModel) -> GGUFModelSpec:
    for key, wanted in (("activation_function", "swiglu"), ("position_embedding_type", "alibi")):
        if model.find(key) != wanted:
            text = f"config.json: {key} is {model.find(key)!r}, but llama.cpp's jais has {wanted!r}"
            raise SourceError(text, hint="write safetensors")
    keys = {
        "attention.max_alibi_bias": f32(_ALIBI_BIAS),
        "block_count": u32(model.layers),
        "context_length": u32(model.require("n_positions")),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.require("n_inner")),
        "attention.head_count": u32(model.heads),
        "attention.layer_norm_epsilon": f32(model.require("layer_norm_epsilon")),
        **FILE_TYPE,
    }
    return make_spec(
        model,
        "jais",
        keys,
        _slopes,
        _scaled,
        transposed,
        vocab="gpt2",
        required_per_block=(*DECODER, "ffn_gate"),
        required=("token_embd", "output_norm", "output"),
    )


def _slopes(stored: HFTensor) -> RuleResult:
    return "llama.cpp computes ALiBi's slopes itself" if stored.name.endswith("relative_pe.slopes") else None


def _scaled(stored: HFTensor) -> RuleResult:
    """The embedding and the output, multiplied by the config's scales."""
    model = stored.model
    if stored.name.endswith("wte.weight"):
        return (stored.tensor(factors=(float(model.require("mup_embeddings_scale", "embeddings_scale")),)),)
    if stored.name != "lm_head.weight":
        return None
    if (alpha := model.find("mup_output_alpha")) is not None:
        return (stored.tensor(factors=(float(alpha * model.require("mup_width_scale")),)),)
    return (stored.tensor(factors=(float(model.require("width_scale")),)),)
