"""StarCoder 2: names and the common keys are all."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import text_keys
from mergeforge.gguf.architectures.model import Model
from mergeforge.gguf.architectures.tensor_mapping import DECODER, spelled


@architecture("Starcoder2ForCausalLM")
def starcoder2(model: Model) -> GGUFModelSpec:
    return spelled(model, "starcoder2", text_keys(model), vocab="gpt2", needs=DECODER)
