"""How long a run takes, before it is begun: the arithmetic of a step over what this device does a second."""

from __future__ import annotations

import time

from mergeforge.train.auto_config import ResolvedSettings
from mergeforge.train.model_stats import ModelStats

SIZE = 1024  # of the matrices that are multiplied to find out
SHARE = 0.4  # of a matrix product's speed that training reaches


def operations(facts: ModelStats, choices: ResolvedSettings, tokens: int) -> float:
    """Multiplications and additions for `tokens`: 2 forwards, 2 for the inputs' gradients, 2 for the weights'.

    Frozen weights need no gradient of their own; checkpointed activations are computed once more.
    """
    each = 2 + 2 + (2 if choices.setup.method == "full" else 0) + (2 if choices.setup.checkpointing else 0)
    return each * (facts.parameters - facts.embedding) * tokens


def estimate_seconds(facts: ModelStats, choices: ResolvedSettings, tokens: int) -> float:
    """An estimate: `operations` at SHARE of the speed of a matrix product on the device."""
    return operations(facts, choices, tokens) / (SHARE * matmul_speed(choices.device, choices.dtype))


def matmul_speed(device: str, dtype: str) -> float:
    """Operations a second of a matrix product, measured in a quarter of a second."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    size = SIZE * (4 if device.startswith("cuda") else 1)
    one = torch.randn(size, size, device=device).to(kind)
    done, started = 0, 0.0
    while done < 2 or time.monotonic() - started < 0.25:
        started = started or time.monotonic()
        one @ one
        done += 1
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    return 2 * size**3 * done / (time.monotonic() - started)
