"""Memory of a training step on a CPU, fitted to peaks of Llama models of 50 to 135 M parameters in float32.

Autograd keeps KEPT_HIDDEN or KEPT_HIDDEN_FULL vectors of the hidden size, and KEPT_INTERMEDIATE of the MLP's, for each
token and layer. With adapters, the measured peaks are larger by HOLES_PER_OUTPUT tensors of the size of each adapted
module's output. Nothing keeps those tensors, so they are probably space that glibc did not use again.
"""

from __future__ import annotations

from mergeforge.train.model_stats import ModelStats
from mergeforge.train.training_setup import TrainingSetup

PYTHON_NBYTES = 475_000_000  # an interpreter with torch, transformers and peft
KEPT_HIDDEN, KEPT_HIDDEN_FULL, KEPT_INTERMEDIATE = 8.7, 10.6, 4.0  # full training also keeps the inputs of norms
HOLES_PER_OUTPUT = 1  # 2 with PEFT's own forward; see loop/lora_forward.py
LOGIT_NBYTES = 12  # per logit: its log-probability, the gradients of both, in float32


def step_parts(stats: ModelStats, setup: TrainingSetup, tokens: int) -> dict[str, int]:
    """What a step with a batch of `tokens` needs besides weights, gradients and optimizer."""
    largest = max((module.numel for module in stats.linears), default=0)
    return {
        "activations": _activations(stats, setup, tokens),
        "logits": min(setup.ce_chunk or tokens, tokens) * stats.vocabulary * LOGIT_NBYTES,
        "dequantized weight": largest * setup.dtype_bytes if setup.method == "qlora" else 0,
        "Python": PYTHON_NBYTES,
    }


def _activations(stats: ModelStats, setup: TrainingSetup, tokens: int) -> int:
    """All layers; with checkpointing one layer, and the inputs of the others."""
    every_layer = _kept(stats, setup) * stats.layers + _holes(stats, setup)
    if setup.checkpointing:
        every_layer = every_layer / max(stats.layers, 1) + stats.layers * stats.hidden
    return int(tokens * every_layer * setup.dtype_bytes)


def _kept(stats: ModelStats, setup: TrainingSetup) -> float:
    """Elements for each token and layer that the backward pass needs."""
    vectors = KEPT_HIDDEN_FULL if setup.method == "full" else KEPT_HIDDEN
    return vectors * stats.hidden + KEPT_INTERMEDIATE * stats.intermediate


def _holes(stats: ModelStats, setup: TrainingSetup) -> int:
    """Elements for each token, in all layers, that are freed and not used again."""
    if setup.method == "full":
        return 0
    return HOLES_PER_OUTPUT * sum(module.out_features for module in stats.adapted(setup.lora))
