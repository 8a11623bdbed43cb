"""NEFTune: noise on the input embeddings in training (arXiv 2310.05914)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def add_embedding_noise(model: Any, alpha: float) -> None:
    """Add uniform noise of at most alpha / sqrt(tokens x hidden size) to what the input embedding returns."""

    def add_noise(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        if not module.training:
            return rows
        largest = alpha / math.sqrt(rows.shape[-2] * rows.shape[-1])
        return rows + rows.new_empty(rows.shape).uniform_(-largest, largest)

    model.get_input_embeddings().register_forward_hook(add_noise)
