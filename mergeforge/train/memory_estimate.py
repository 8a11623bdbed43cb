"""How much of the device's memory a training step takes, by part.

The formula is that of the project's notes on public figures: fitted to LLaMA-Factory's table of LLaMA 2 7B with QLoRA
(README, "Hardware Requirement": 6, 7, 9, 12, 19, 32 GB at 1k to 32k tokens with FlashAttention 2), which it meets
3 to 10 % low; hence MARGIN.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergeforge.train.model_stats import ModelStats
from mergeforge.train.settings import LoraOptions

MARGIN = 1.08
NF4 = 0.5161  # bytes a weight: 4 bits, a scale of 8 bits for 64, of 32 bits for 256 scales
DEVICE = 550_000_000  # CUDA's own, and its libraries'
HOST = 450_000_000  # an interpreter with torch and transformers
STATES: dict[str, float] = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0, "lion_8bit": 1}
STATES |= {"paged_lion_8bit": 0, "adafactor": 0.1, "sgd": 0}
LOGIT = 10  # bytes a logit: 16 bit, float32, its gradient


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory goes. `ce_chunk` 0: all logits at once; `width`: bytes of a number."""

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

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return int(sum(self.parts.values()) * MARGIN)


def estimate_memory(facts: ModelStats, way: TrainingSetup) -> MemoryEstimate:
    """The peak of one step."""
    linear = sum(one.numel for one in facts.linears)
    embedding = 0 if way.embed_on_cpu else facts.embedding
    if way.method == "full":
        weights = {"weights": facts.parameters * 4}
        trained = facts.parameters
        training = trained * (4 + STATES[way.optimizer])
    else:
        kept = NF4 if way.method == "qlora" else way.dtype_bytes
        weights = {"weights": int(linear * kept + facts.other_parameters * way.dtype_bytes)}
        weights["embeddings"] = (embedding + facts.head) * way.dtype_bytes
        trained = facts.adapter_parameters(way.lora)
        training = trained * (4 + 4 + STATES[way.optimizer])
    return MemoryEstimate(
        {
            **weights,
            "trained weights, gradients, optimizer": int(training),
            "activations": _activations(facts, way),
            "logits": min(way.ce_chunk or way.tokens, way.tokens) * facts.vocabulary * LOGIT,
            "dequantised weight": max((one.numel for one in facts.linears), default=0) * way.dtype_bytes,
            "CUDA" if way.on_gpu else "Python": DEVICE if way.on_gpu else HOST,
        }
    )


def _activations(facts: ModelStats, way: TrainingSetup) -> int:
    """What one layer computes, and what is kept of the others: their inputs, or everything."""
    layer = way.tokens * way.dtype_bytes * (10 * facts.hidden + 6 * facts.intermediate)
    if not way.checkpointing:
        return layer * facts.layers
    return layer + (0 if way.offload else way.tokens * facts.layers * facts.hidden * way.dtype_bytes)
