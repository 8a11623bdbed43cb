"""MiniCPM 1: Llama with scales."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import paired_heads
from mergeforge.gguf.architectures.constants import long_factors
from mergeforge.gguf.architectures.hparams import text_keys
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.tensor_mapping import spelled
from mergeforge.gguf.key_values import f32


@architecture("MiniCPMForCausalLM")
def minicpm(model: Model) -> GGUFModelSpec:
    keys = text_keys(model) | {
        "embedding_scale": f32(model.need("scale_emb")),
        "residual_scale": f32(model.need("scale_depth") / model.layers**0.5),
        "logit_scale": f32(model.hidden / model.need("dim_model_base")),
    }
    constants = long_factors(model, model.hidden // model.heads)
    return spelled(model, "minicpm", keys, paired_heads, vocab="spm", constants=constants)
