"""Estimates of a run before it starts: memory of a step by part, and time. cpu_memory.py has the parts on a CPU.

A GPU's memory is fitted to LLaMA-Factory's table for LLaMA 2 7B with QLoRA (README, "Hardware Requirement": 6, 7, 9,
12, 19, 32 GB at 1k to 32k tokens with FlashAttention 2). The formula is 3 to 10 % below that table, hence MARGIN.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from mergeforge.train.cpu_memory import step_parts
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.model_stats import ModelStats
from mergeforge.train.training_setup import TrainingSetup

MARGIN = 1.08
NF4_NBYTES = 0.5161  # per weight: 4 bits, an 8-bit scale per 64 weights, a 32-bit scale per 256 scales
CUDA_NBYTES = 550_000_000  # CUDA context and libraries
# optimizer state in bytes per trained weight; paged state may leave the GPU
STATE_NBYTES: dict[str, float] = {
    "adamw": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 0,
    "paged_adamw_32bit": 0,
    "lion_8bit": 1,
    "paged_lion_8bit": 0,
    "adafactor": 0.1,
    "sgd": 0,
    "galore_adamw": 8,  # of all but linear modules
    "apollo_adamw": 8,
}
LOGIT_NBYTES = 10  # per logit: 16 bit, float32, its gradient
TRAINED = "trained weights, gradients, optimizer"
MATRIX_SIZE = 1024  # of the matrix products that measure the device's speed; 4 times as large on a GPU
UTILIZATION = 0.4  # of a matrix product's speed that training reaches


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return int(sum(self.parts.values()) * MARGIN)


def estimate_memory(stats: ModelStats, setup: TrainingSetup, tokens: int = 0) -> MemoryEstimate:
    """Estimate the peak memory of one training step. tokens: of the largest batch; 0: a full one."""
    tokens = tokens or setup.tokens
    step = _on_gpu(stats, setup, tokens) if setup.on_gpu else step_parts(stats, setup, tokens)
    return MemoryEstimate({**_weights(stats, setup), TRAINED: _trained(stats, setup), **step})


def _weights(stats: ModelStats, setup: TrainingSetup) -> dict[str, int]:
    """The base: in float32 where it is trained."""
    if setup.method == "full":
        return {"weights": stats.parameters * 4}
    linear_numel = sum(module.numel for module in stats.linears)
    linear_nbytes = NF4_NBYTES if setup.method == "qlora" else setup.dtype_bytes
    embedding_numel = 0 if setup.embed_on_cpu else stats.embedding
    return {
        "weights": int(linear_numel * linear_nbytes + stats.other_parameters * setup.dtype_bytes),
        "embeddings": (embedding_numel + stats.head) * setup.dtype_bytes,
    }


def _trained(stats: ModelStats, setup: TrainingSetup) -> int:
    """Gradients and optimizer state, and the weights of an adapter."""
    if setup.method == "full":
        return int(stats.parameters * (4 + STATE_NBYTES[setup.optimizer]) - _low_rank_savings(stats, setup))
    return int(stats.adapter_parameters(setup.lora) * (4 + 4 + STATE_NBYTES[setup.optimizer]))


def _on_gpu(stats: ModelStats, setup: TrainingSetup, tokens: int) -> dict[str, int]:
    """What a step needs besides weights, gradients and optimizer."""
    return {
        "activations": _activations(stats, setup, tokens),
        "logits": min(setup.ce_chunk or tokens, tokens) * stats.vocabulary * LOGIT_NBYTES,
        "dequantized weight": max((module.numel for module in stats.linears), default=0) * setup.dtype_bytes,
        "CUDA": CUDA_NBYTES,
    }


def _low_rank_savings(stats: ModelStats, setup: TrainingSetup) -> int:
    """Bytes of state that a low-rank optimizer does without: two moments and a projector for each linear module."""
    if setup.optimizer not in LOW_RANK_OPTIMIZERS:
        return 0
    saved = 0
    for module in stats.linears:
        short, long = sorted((module.in_features, module.out_features))
        rank = min(setup.optimizer_rank, short)
        saved += 8 * module.numel - 4 * rank * (2 * long + short)
    return max(saved, 0)


def _activations(stats: ModelStats, setup: TrainingSetup, tokens: int) -> int:
    """One layer's activations, plus what is stored for the other layers: their inputs, or everything."""
    layer = tokens * setup.dtype_bytes * (10 * stats.hidden + 6 * stats.intermediate)
    if not setup.checkpointing:
        return layer * stats.layers
    return layer + (0 if setup.offload else tokens * stats.layers * stats.hidden * setup.dtype_bytes)


def estimate_seconds(
    stats: ModelStats, setup: TrainingSetup, tokens: int, *, device: str, dtype: str, speed: float | None = None
) -> float:
    """Estimate how long training on `tokens` takes.

    speed: of matrix products in operations per second; None measures it on the device.
    """
    return _operations(stats, setup, tokens) / (UTILIZATION * (speed or _matmul_speed(device, dtype)))


def _operations(stats: ModelStats, setup: TrainingSetup, tokens: int) -> float:
    """Multiplications and additions for `tokens`: 2 forward, 2 for the input gradients, 2 for the weight gradients.

    Frozen weights need no gradient; checkpointed activations are computed once more.
    """
    per_weight = 2 + 2 + (2 if setup.method == "full" else 0) + (2 if setup.checkpointing else 0)
    per_weight += 2 * setup.extra_passes
    return per_weight * (stats.parameters - stats.embedding) * tokens


def _matmul_speed(device: str, dtype: str) -> float:
    """Operations per second of a matrix product, measured for a quarter of a second."""
    import torch

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    size = MATRIX_SIZE * (4 if device.startswith("cuda") else 1)
    matrix = torch.randn(size, size, device=device).to(torch_dtype)
    products, started = 0, 0.0
    while products < 2 or time.monotonic() - started < 0.25:
        started = started or time.monotonic()
        matrix @ matrix
        products += 1
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    return 2 * size**3 * products / (time.monotonic() - started)
