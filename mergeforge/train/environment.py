"""What a run has to work with: the installed packages, the device of this process, and the other processes.

torchrun and accelerate start several processes and describe them in environment variables.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence

from mergeforge.core.sizes import format_size
from mergeforge.errors import MissingExtraError, RecipeError, pip_install
from mergeforge.tensors.budget import free_memory
from mergeforge.train.auto_config import Machine
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.settings import TrainSettings

PACKAGES = ("transformers", "peft", "accelerate")
BF16_CAPABILITY = (8, 0)  # CUDA compute capability; older GPUs emulate bf16, slowly
RESERVED = 0.05  # fraction of a GPU's free memory that is left alone


def check_packages(*, quantize: bool = False, track: Sequence[str] = (), optimizer: str | None = None) -> None:
    """Raise MissingExtraError unless everything is installed that training needs and that metrics are sent to."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it asks for a package that fetches code
    packages = (*PACKAGES, "bitsandbytes") if quantize else PACKAGES
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError(f"training needs {name}: {error}", hint=pip_install(*packages)) from None
    if low_rank := LOW_RANK_OPTIMIZERS.get(optimizer or ""):
        try:
            importlib.import_module(low_rank.module)
        except ImportError as error:
            text = f"optimizer: {optimizer} needs {low_rank.package}: {error}"
            raise MissingExtraError(text, hint=pip_install(low_rank.package)) from None
    for name in track:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"track: {name} is not installed", hint=pip_install(name))


def versions() -> dict[str, str]:
    """The versions of every package that influences the numbers."""
    installed = {}
    for name in ("mergeforge", "torch", *PACKAGES, "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def find_machine(settings: TrainSettings, device: str = "auto") -> Machine:
    """The device of this process, its free memory (or `memory.budget`), and the dtype to compute in.

    Raises RecipeError for a dtype that the device cannot compute in, or a device that is not there.
    """
    import torch

    name = _device(device)
    if name.startswith("cuda"):
        free = int(torch.cuda.mem_get_info(name)[0] * (1 - RESERVED))
        has_bf16 = torch.cuda.get_device_capability(name) >= BF16_CAPABILITY
        dtype = settings.dtype or ("bf16" if has_bf16 else "fp16")
        if dtype == "bf16" and not has_bf16:
            raise RecipeError(f"{torch.cuda.get_device_name(name)} does not support bf16", hint="set dtype: fp16")
    else:
        free, dtype = free_memory(), settings.dtype or "fp32"
        if dtype == "fp16":
            raise RecipeError(f"training in fp16 does not work on {name}", hint="set dtype: bf16 or dtype: fp32")
        if name == "mps" and settings.method == "qlora":
            raise RecipeError("bitsandbytes cannot train in 4 bit on mps", hint="set method: lora")
    return Machine(name, settings.memory.budget or free, dtype)


def _device(requested: str) -> str:
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process a GPU
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if requested.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"torch finds no CUDA device for {requested}", hint="use --device cpu")
    return "cuda:0" if requested == "cuda" else requested


def describe_machine(machine: Machine) -> str:
    """The machine in one line."""
    return f"{machine.device}, {format_size(machine.memory)} of memory, computing in {machine.dtype}"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide the libraries' own progress bars, hints and deprecation warnings."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # PEFT's own, for fused experts
        yield
    transformers_logging.set_verbosity(verbosity)


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block before the others, so that they find what it wrote."""
    if process_count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield
