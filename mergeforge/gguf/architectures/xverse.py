"""XVERSE: Llama's tensors."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import make_spec
from mergeforge.gguf.key_values import string, u32


@architecture("XverseForCausalLM")
def xverse(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "tensor_data_layout": string("Meta AI original pth"),
        "rope.dimension_count": u32(model.hidden // model.heads),
    }
    return make_spec(model, "xverse", keys, permute_rope_heads, vocab="spm")
