"""Whether the extra `train` is installed, and what the machine can train with."""

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
from mergeforge.errors import MissingExtraError, RecipeError
from mergeforge.tensors.budget import free_memory
from mergeforge.train.auto_config import Machine
from mergeforge.train.settings import TrainSettings

PACKAGES = ("transformers", "peft", "accelerate")
BF16_FROM = (8, 0)  # compute capability; older cards emulate bf16, slowly
RESERVED_NBYTES = 0.05  # of a card's free memory


def check_packages(*, quantise: bool = False, track: Sequence[str] = ()) -> None:
    """Raise MissingExtraError unless everything that training imports is there, and what metrics are sent to."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it asks for a package that fetches code
    for name in (*PACKAGES, "bitsandbytes") if quantise else PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            hint = "pip install 'mergeforge[train]'"
            raise MissingExtraError(f"training needs {name}: {error}", hint=hint) from None
    for name in track:
        if importlib.util.find_spec(name) is None:
            hint = "pip install 'mergeforge[track]'" if name == "tensorboard" else f"pip install {name}"
            raise MissingExtraError(f"track: {name} is not installed", hint=hint)


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    found = {}
    for name in ("mergeforge", "torch", *PACKAGES, "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(settings: TrainSettings, device: str = "auto") -> Machine:
    """The device of this process, its free memory (or `memory.budget`), and the dtype that suits it.

    Raises RecipeError for a dtype that the device cannot compute in, or a device that is not there.
    """
    import torch

    name = _device(device)
    if name.startswith("cuda"):
        free = int(torch.cuda.mem_get_info(name)[0] * (1 - RESERVED_NBYTES))
        good = torch.cuda.get_device_capability(name) >= BF16_FROM
        dtype = settings.dtype or ("bf16" if good else "fp16")
        if dtype == "bf16" and not good:
            card = torch.cuda.get_device_name(name)
            raise RecipeError(f"{card} does not compute in bf16", hint="dtype: fp16")
    else:
        free, dtype = free_memory(), settings.dtype or "fp32"
        if dtype == "fp16":
            raise RecipeError(f"{name} does not train in fp16", hint="dtype: bf16 or fp32")
        if name == "mps" and settings.method == "qlora":
            raise RecipeError("bitsandbytes does not train in 4 bit on mps", hint="method: lora")
    return Machine(name, settings.memory.budget or free, dtype)


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process a card
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--device {asked}: torch finds no CUDA device", hint="--device cpu")
    return "cuda:0" if asked == "cuda" else asked


def describe_machine(machine: Machine) -> str:
    """The machine in a line."""
    return f"{machine.device}, {format_size(machine.memory)} to use, computing in {machine.dtype}"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Without the libraries' own bars, hints, and notices of what their next version removes."""
    from transformers.utils import logging as said

    kept = said.get_verbosity()
    said.set_verbosity_error()
    said.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # PEFT's own, for fused experts
        yield
    said.set_verbosity(kept)
