"""MiniCPM 1: Llama with three scaling factors."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_factors_longrope
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import make_spec
from mergeforge.gguf.key_values import f32


@architecture("MiniCPMForCausalLM")
def minicpm(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "embedding_scale": f32(model.require("scale_emb")),
        "residual_scale": f32(model.require("scale_depth") / model.layers**0.5),
        "logit_scale": f32(model.hidden / model.require("dim_model_base")),
    }
    constants = rope_factors_longrope(model, model.hidden // model.heads)
    return make_spec(model, "minicpm", keys, permute_rope_heads, vocab="spm", constants=constants)
