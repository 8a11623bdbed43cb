"""GPUs that a run can be planned for without having one: memory, dtype and speed.

Speeds are those of dense 16-bit matrix products with float32 accumulation, in 10^12 operations per second. Memory and
speeds were written down from memory in 2026-11, and not checked against NVIDIA's datasheets: plans made with them are
estimates. The GB of memory that NVIDIA states are GiB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergeforge.core.sizes import parse_size
from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.train.auto_config import Machine

GIB = 1 << 30
USABLE = 0.93  # of the memory: the driver, a display and fragmentation take the rest


@dataclass(frozen=True)
class GPU:
    """`memory` in GiB, `tflops` in 10^12 operations per second; `bf16`: whether it computes in bf16 at full speed."""

    name: str
    memory: int
    tflops: float
    bf16: bool = True

    @property
    def usable(self) -> int:
        """Bytes that a training may use."""
        return int(self.memory * GIB * USABLE)


GPUS = (
    GPU("RTX 2060", 6, 25.8, bf16=False),
    GPU("RTX 2070", 8, 29.9, bf16=False),
    GPU("RTX 2080 Ti", 11, 53.8, bf16=False),
    GPU("RTX 3060", 12, 25.5),
    GPU("RTX 3070", 8, 40.6),
    GPU("RTX 3080", 10, 59.5),
    GPU("RTX 3090", 24, 71.0),
    GPU("RTX 4060", 8, 30.2),
    GPU("RTX 4060 Ti", 16, 44.1),
    GPU("RTX 4070", 12, 58.3),
    GPU("RTX 4080", 16, 97.5),
    GPU("RTX 4090", 24, 165.2),
    GPU("RTX 5070", 12, 61.7),
    GPU("RTX 5080", 16, 112.6),
    GPU("RTX 5090", 32, 209.5),
    GPU("T4", 16, 65.0, bf16=False),
    GPU("V100", 16, 125.0, bf16=False),
    GPU("L4", 24, 121.0),
    GPU("A10", 24, 125.0),
    GPU("A30", 24, 165.0),
    GPU("A40", 48, 149.7),
    GPU("RTX A6000", 48, 154.8),
    GPU("L40S", 48, 362.0),
    GPU("A100 40GB", 40, 312.0),
    GPU("A100", 80, 312.0),
    GPU("H100", 80, 989.0),
    GPU("H200", 141, 989.0),
    GPU("B200", 180, 2250.0),
)


@dataclass(frozen=True)
class PlannedGPU:
    """A GPU to plan for, and the one whose speed is taken; they differ where only a size was named."""

    usable: int
    label: str
    speed_of: GPU

    def machine(self, dtype: str | None, budget: int | None) -> Machine:
        """The machine as the plan needs it. Raises RecipeError for a dtype that the GPU does not compute in."""
        if dtype == "bf16" and not self.speed_of.bf16:
            raise RecipeError(f"the {self.speed_of.name} does not support bf16", hint="set dtype: fp16")
        return Machine("cuda", budget or self.usable, dtype or ("bf16" if self.speed_of.bf16 else "fp16"))

    @property
    def operations_per_second(self) -> float:
        return self.speed_of.tflops * 1e12

    @property
    def source(self) -> str:
        """Where the speed comes from."""
        return f"{self.speed_of.tflops:g} TFLOPS of the {self.speed_of.name}; not checked against its datasheet"


def find_gpu(text: str) -> PlannedGPU:
    """The GPU with a name from the table (`4090`, `a100-80gb`, `RTX 3060`) or a size (`8GB`).

    For a size, the speed is that of the slowest GPU with at least as much memory. Raises RecipeError.
    """
    by_name = {alias: gpu for gpu in GPUS for alias in _aliases(gpu)}
    if gpu := by_name.get(_normalized(text)):
        return PlannedGPU(gpu.usable, f"{gpu.name}, {gpu.memory} GB", gpu)
    try:
        memory = parse_size(re.sub(r"(?i)\s*gi?b?$", "GiB", text.strip()))
        if memory < GIB:
            raise ValueError("no GPU is that small")
    except ValueError:
        names = ", ".join(gpu.name for gpu in GPUS)
        hint = did_you_mean(text, [gpu.name for gpu in GPUS]) or f"name a size such as 8GB, or one of: {names}"
        raise RecipeError(f"there is no GPU '{text}' in the table", hint=hint) from None
    large = [gpu for gpu in GPUS if gpu.memory * GIB >= memory] or [max(GPUS, key=lambda gpu: gpu.memory)]
    slowest = min(large, key=lambda gpu: (gpu.memory, gpu.tflops))
    return PlannedGPU(int(memory * USABLE), f"a GPU with {memory / GIB:.3g} GB", slowest)


def _aliases(gpu: GPU) -> set[str]:
    """Ways to write its name: with and without maker and series, and with its memory."""
    full = _normalized(gpu.name)
    names = {full, re.sub(r"^(rtx|gtx)", "", full)}
    size = f"{gpu.memory}gb"
    return names | {f"{name}{size}" for name in names if not name.endswith(size)}


def _normalized(text: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())
