"""Which of several processes this one is: torchrun and accelerate say so in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through alone, then the others: what it wrote, they find."""
    if process_count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield
