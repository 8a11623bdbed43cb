"""Settings of a model that llama.cpp ignores: warnings, since the file can still be written.

GGUF has no key for them, or llama.cpp does not read it; the converter says nothing about them.
From src/llama-context.cpp and src/models/ of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mergeforge.gguf.architectures.model import HFModel

_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "su", "longrope", "mrope", "dynamic")
_FACTORS = ("phi3", "phimoe", "minicpm")  # families whose longrope factors are in the file


def rope_warnings(model: HFModel, arch: str, constants: Mapping[str, Any]) -> Iterator[str]:
    """Types of rope scaling that llama.cpp does not implement. `constants`: tensors that the file gets."""
    rope = model.full_rope
    kind = str(rope.get("rope_type", "default"))
    if kind == "dynamic":
        yield "llama.cpp has no dynamic rope scaling: it does not scale texts longer than max_position_embeddings"
    elif kind == "llama3" and "rope_freqs.weight" not in constants:
        yield f"llama.cpp's {arch} has no llama3 rope scaling: positions are not scaled"
    elif kind in ("su", "longrope") and arch not in _FACTORS:
        yield f"llama.cpp's {arch} has no longrope: its factors are not written"
    elif kind not in _ROPE_TYPES:
        yield f"llama.cpp does not know the rope type '{kind}'"
    elif kind == "yarn" and (odd := _odd_attention_factor(rope)):
        yield odd


def _odd_attention_factor(rope: Mapping[str, Any]) -> str:
    """llama.cpp computes yarn's attention factor itself, with mscale 1 (or equal to mscale_all_dim)."""
    stated, factor = rope.get("attention_factor", rope.get("attn_factor")), float(rope.get("factor") or 1)
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if stated is not None and not math.isclose(stated, usual, rel_tol=1e-4):
        return f"llama.cpp uses {usual:.4f} as yarn's attention factor, but this model has {stated}"
    scale, all_scale = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and all_scale and scale != 1 and scale != all_scale:
        return f"llama.cpp uses 1 as yarn's mscale, but this model has {scale}"
    return ""


def sliding_window_warnings(model: HFModel, writes_window: bool, period: int = 0) -> Iterator[str]:
    """Sliding windows that the file has no key for, or that are not in all layers except every `period`th."""
    window = model.find("sliding_window")
    if window and not writes_window and model.find("use_sliding_window") is not False:
        yield f"llama.cpp attends to the whole context, but this model to the last {window} tokens (sliding_window)"
    kinds = model.find("layer_types")
    if not period or not kinds:
        return
    slides = [kind == "sliding_attention" for kind in kinds]
    if slides != [(at + 1) % period != 0 for at in range(len(kinds))]:
        yield f"llama.cpp has full attention in every {period}th layer, but layer_types in config.json says otherwise"


def attention_scale_warnings(model: HFModel, arch: str) -> Iterator[str]:
    """Gemma's query_pre_attn_scalar: llama.cpp uses the head size, or hidden / heads for a 27B."""
    large = {"gemma2": 46, "gemma3": 62}[arch]
    used = model.hidden // model.heads if model.layers == large else model.head_dim
    scalar = model.find("query_pre_attn_scalar")
    if scalar is not None and scalar != used:
        yield f"llama.cpp scales attention for query_pre_attn_scalar {used}, but this model has {scalar}"


def output_head_warnings(model: HFModel) -> Iterator[str]:
    if "lm_head.weight" in model.tensors:
        yield "lm_head.weight is not written: llama.cpp uses the embedding as the output of this family"
