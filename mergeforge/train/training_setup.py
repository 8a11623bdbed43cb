"""TrainingSetup: the settings of a run that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

from mergeforge.train.low_rank import RANK
from mergeforge.train.settings import LoraOptions


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it. `ce_chunk`: rows of logits held at once, 0 for all.

    `answers`: sequences that a row of data fills; `extra_passes`: forward passes of a step without a backward pass.
    `optimizer_rank`: of the state of a low-rank optimizer.
    """

    method: str
    lora: LoraOptions
    seq_len: int
    micro_batch: int
    optimizer: str
    dtype_bytes: int
    ce_chunk: int
    checkpointing: bool
    offload: bool = False
    embed_on_cpu: bool = False
    on_gpu: bool = True
    answers: int = 1
    extra_passes: int = 0
    optimizer_rank: int = RANK

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.micro_batch * self.seq_len * self.answers
