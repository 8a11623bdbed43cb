"""Tensors computed from the config: the scaling factors of rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures.model import HFModel

if TYPE_CHECKING:
    import numpy as np


def rope_freq_factors_llama3(model: HFModel, factor: float = 8.0) -> Mapping[str, np.ndarray]:
    """rope_freqs.weight of llama3 rope: divisors of the frequencies (transformers: _compute_llama3_parameters).

    Computed in torch's float32, as the converter does, to get the same bits.
    """
    import torch

    rope = model.full_rope
    if str(rope.get("rope_type", "")).lower() != "llama3":
        return {}
    size, context = model.head_dim, rope.get("original_max_position_embeddings", 8192)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    factor = rope.get("factor", factor)
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    waves = 2 * math.pi / (1.0 / (rope.get("rope_theta", 10000.0) ** steps))
    if low == high:
        stretched = torch.where(waves > context / low, float(factor), 1.0)
    else:
        smooth = (context / waves - low) / (high - low)
        stretched = torch.where(waves > context / low, float(factor), 1 / ((1 - smooth) / factor + smooth))
    divisors: np.ndarray = torch.where(waves < context / high, 1.0, stretched).float().numpy()
    return {"rope_freqs.weight": divisors}


def rope_factors_longrope(model: HFModel, rotated: int) -> Mapping[str, np.ndarray]:
    """rope_factors_long and rope_factors_short of longrope, for `rotated` dimensions of a head. Raises SourceError."""
    import numpy as np

    long, short = (model.rope.get(key) for key in ("long_factor", "short_factor"))
    if not long and not short:
        return {}
    for key, factors in (("long_factor", long), ("short_factor", short)):
        if not factors or len(factors) != rotated // 2:
            raise SourceError(
                f"config.json: longrope's {key} has {len(factors or ())} factors, but {rotated} dimensions are rotated",
                hint=f"it must be a list of {rotated // 2} numbers",
            )
    return {
        "rope_factors_long.weight": np.asarray(long, dtype=np.float32),
        "rope_factors_short.weight": np.asarray(short, dtype=np.float32),
    }
