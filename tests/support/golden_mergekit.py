"""The sampled elements of every tensor that golden_mergekit.json holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from support.paths import TESTS

GOLDEN = TESTS / "methods" / "golden_mergekit.json"
PER_TENSOR = 8


def samples(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Eight evenly spaced elements of every tensor, sorted by name: (tensors, 8) float32."""
    rows = []
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten().float().numpy()
        rows.append(flat[np.linspace(0, len(flat) - 1, PER_TENSOR).astype(int)])
    return np.stack(rows).astype("<f4")
