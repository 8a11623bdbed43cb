"""StarCoder 2: only names and common keys."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import DECODER, make_spec


@architecture("Starcoder2ForCausalLM")
def starcoder2(model: HFModel) -> GGUFModelSpec:
    return make_spec(model, "starcoder2", hparams(model), vocab="gpt2", required_per_block=DECODER)
