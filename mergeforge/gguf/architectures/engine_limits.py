"""Settings of a model that llama.cpp ignores: warnings, since the file can still be written.

GGUF has no key for them, or llama.cpp does not read it; the converter says nothing about them.
From src/llama-context.cpp and src/models/ of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures.model import HFModel

_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "su", "longrope", "mrope", "dynamic")
_IN_FILE = {"rope_freqs.weight", "rope_factors_long.weight"}  # tensors that scale the frequencies
_DYNAMIC = ("hunyuan-dense", "hunyuan-moe", "hunyuan_vl")  # their scaling is fixed, and written as a base or a factor


def rope_warnings(model: HFModel, arch: str, constants: Mapping[str, Any]) -> Iterator[WarningText]:
    """Types of rope scaling that llama.cpp does not implement. `constants`: tensors that the file gets."""
    rope = model.full_rope
    kind = str(rope.get("rope_type", "default"))
    if _IN_FILE & constants.keys() or (arch in _DYNAMIC and kind in ("dynamic", "xdrope")):
        return
    if kind == "dynamic":
        yield WarningText(
            "llama.cpp has no dynamic rope scaling: it does not scale texts longer than max_position_embeddings"
        )
    elif kind == "llama3":
        yield WarningText(f"llama.cpp's {arch} has no llama3 rope scaling: positions are not scaled")
    elif kind in ("su", "longrope"):
        yield WarningText(f"llama.cpp's {arch} has no longrope: its factors are not written")
    elif kind not in _ROPE_TYPES:
        yield WarningText(f"llama.cpp does not know the rope type '{kind}'")
    elif kind == "yarn" and (odd := _odd_attention_factor(rope)):
        yield WarningText(odd)


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


def sliding_window_warnings(model: HFModel, writes_window: bool, period: int = 0) -> Iterator[WarningText]:
    """Sliding windows that the file has no key for, or that are not in all layers except every `period`th."""
    window, kinds = model.find("sliding_window"), model.find("layer_types")
    is_used = model.find("use_sliding_window") is not False and (not kinds or "sliding_attention" in kinds)
    if window and is_used and not writes_window:
        yield WarningText(
            f"llama.cpp attends to the whole context, but this model to the last {window} tokens (sliding_window)"
        )
    if not period or not kinds:
        return
    slides = [kind == "sliding_attention" for kind in kinds]
    if slides != [(at + 1) % period != 0 for at in range(len(kinds))]:
        yield WarningText(
            f"llama.cpp has full attention in one layer of every {period}, but layer_types of this model says otherwise"
        )


def attention_scale_warnings(model: HFModel, arch: str) -> Iterator[WarningText]:
    """Gemma's query_pre_attn_scalar: llama.cpp uses the head size, or hidden / heads for a 27B."""
    large = {"gemma2": 46, "gemma3": 62}.get(arch)
    used = model.hidden // model.heads if model.layers == large else model.head_dim
    scalar = model.find("query_pre_attn_scalar")
    if scalar is not None and scalar != used:
        yield WarningText(f"llama.cpp scales attention for query_pre_attn_scalar {used}, but this model has {scalar}")


def output_head_notes(model: HFModel) -> Iterator[str]:
    """A head that is dropped. One that differs from the embedding is an error (see planner/gguf.py)."""
    if "lm_head.weight" in model.tensors:
        yield "lm_head.weight is not written: llama.cpp uses the embedding as the output of this family"
