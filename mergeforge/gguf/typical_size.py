"""Bits per weight of a file type in a typical model: a type mixes tensor types, so its name says less than that."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mergeforge.gguf.file_types import FileType, ModelHparams, select_tensor_types
from mergeforge.gguf.low_bit_rules import needs_imatrix

TYPICAL_MODEL = "Llama 3.1 8B"
_LAYERS, _HIDDEN, _FEED_FORWARD, _KV_ROWS, _VOCAB = 32, 4096, 14336, 1024, 128256
_HPARAMS = ModelHparams("llama", _LAYERS, head_count=32, head_count_kv=8)


def typical_bits_per_weight(file_type: FileType) -> float:
    """Bits per weight of TYPICAL_MODEL's tensors in this type, without an imatrix if it needs none."""
    shapes = dict(_shapes())
    types = select_tensor_types(file_type, shapes, _HPARAMS, has_imatrix=typically_needs_imatrix(file_type))
    nbytes = sum(math.prod(shapes[name]) / kind.block * kind.nbytes for name, kind in types.items())
    return nbytes * 8 / sum(map(math.prod, shapes.values()))


def typically_needs_imatrix(file_type: FileType) -> bool:
    """Whether TYPICAL_MODEL cannot be quantized to this type without an imatrix."""
    types = select_tensor_types(file_type, dict(_shapes()), _HPARAMS)
    return any(needs_imatrix(name, kind.name, file_type.label) for name, kind in types.items())


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (_VOCAB, _HIDDEN)
    yield "output.weight", (_VOCAB, _HIDDEN)
    yield "output_norm.weight", (_HIDDEN,)
    for layer in range(_LAYERS):
        for name, rows in (("attn_q", _HIDDEN), ("attn_k", _KV_ROWS), ("attn_v", _KV_ROWS), ("attn_output", _HIDDEN)):
            yield f"blk.{layer}.{name}.weight", (rows, _HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{layer}.{name}.weight", (_FEED_FORWARD, _HIDDEN)
        yield f"blk.{layer}.ffn_down.weight", (_HIDDEN, _FEED_FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (_HIDDEN,)
