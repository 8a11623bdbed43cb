"""StarCoder 2: names and the common keys are all."""

from __future__ import annotations

from mergeforge.architectures import Spelling, architecture
from mergeforge.architectures.model import Model
from mergeforge.architectures.placing import DECODER, spelled
from mergeforge.architectures.textkeys import text_keys


@architecture("Starcoder2ForCausalLM")
def starcoder2(model: Model) -> Spelling:
    return spelled(model, "starcoder2", text_keys(model), vocab="gpt2", needs=DECODER)
