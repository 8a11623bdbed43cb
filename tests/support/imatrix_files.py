"""Importance matrices of random weights for the tensors of a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from mergeforge.gguf.reader import read_gguf

# File types that llama-quantize refuses without an imatrix.
NEED_IMATRIX = ("q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs")


def write_imatrix(file: Path, imatrix: Path, without: str = "") -> dict[str, np.ndarray]:
    """Write weights for every tensor of `file` with two dimensions or more but one, in llama-imatrix's older format.

    Returns them, flat: a row for each matrix of a stack.
    """
    rng = np.random.default_rng(7)
    weights = {
        tensor.name: rng.random(tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) > 2 else 1)).astype(np.float32)
        for tensor in read_gguf(file).tensors.values()
        if len(tensor.shape) > 1 and tensor.name != without
    }
    data = struct.pack("<i", len(weights))
    for name, values in weights.items():
        data += struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", 1, values.size)
        data += values.tobytes()
    imatrix.write_bytes(data)
    return weights
