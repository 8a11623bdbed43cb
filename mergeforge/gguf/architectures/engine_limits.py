"""What llama.cpp takes for granted, where a model says otherwise: notes, since the file can be written.

GGUF has no key for these facts, or the engine does not read it; the converter is silent about them.
From src/llama-context.cpp and src/models/ of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mergeforge.gguf.architectures.model import HFModel

POOLING = (
    "the file does not say how tokens are pooled: run an embedder with --pooling mean, cls or last, as its card says"
)
_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "su", "longrope", "mrope", "dynamic")
_FACTORS = ("phi3", "phimoe", "minicpm")  # families whose longrope factors are in the file


def rope_warnings(model: HFModel, arch: str) -> Iterator[str]:
    """Ways of stretching rope that llama.cpp does not follow."""
    rope = model.full_rope
    kind = str(rope.get("rope_type", "default"))
    if kind == "dynamic":
        yield "llama.cpp has no dynamic rope scaling: texts beyond max_position_embeddings are not stretched"
    elif kind in ("su", "longrope") and arch not in _FACTORS:
        yield f"llama.cpp's {arch} has no longrope: its factors are left out"
    elif kind not in _ROPE_TYPES:
        yield f"llama.cpp does not know the rope type '{kind}'"
    elif kind == "yarn" and (odd := _odd_attention_factor(rope)):
        yield odd


def _odd_attention_factor(rope: Mapping[str, Any]) -> str:
    """The engine computes yarn's factor of attention itself, with mscale one (or as mscale_all_dim)."""
    stated, factor = rope.get("attention_factor", rope.get("attn_factor")), float(rope.get("factor") or 1)
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if stated is not None and not math.isclose(stated, usual, rel_tol=1e-4):
        return f"llama.cpp takes {usual:.4f} as yarn's attention factor, this model has {stated}"
    scale, all_scale = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and all_scale and scale != 1 and scale != all_scale:
        return f"llama.cpp takes yarn's mscale as 1, this model has {scale}"
    return ""


def sliding_window_warnings(model: HFModel, writes_window: bool, period: int = 0) -> Iterator[str]:
    """Sliding windows that the file has no key for, or in other layers than every one but the `period`th."""
    window = model.find("sliding_window")
    if window and not writes_window and model.find("use_sliding_window") is not False:
        yield f"llama.cpp attends to the whole context here, the model to the last {window} tokens (sliding_window)"
    kinds = model.find("layer_types")
    if not period or not kinds:
        return
    slides = [kind == "sliding_attention" for kind in kinds]
    if slides != [(at + 1) % period != 0 for at in range(len(kinds))]:
        yield f"llama.cpp has full attention in every layer {period}, layer_types in config.json says otherwise"


def attention_scale_warnings(model: HFModel, arch: str) -> Iterator[str]:
    """Gemma's query_pre_attn_scalar: the engine takes the head's size, in a 27B (by its layers) hidden / heads."""
    large = {"gemma2": 46, "gemma3": 62}[arch]
    taken = model.hidden // model.heads if model.layers == large else model.head_dim
    scalar = model.find("query_pre_attn_scalar")
    if scalar is not None and scalar != taken:
        yield f"llama.cpp scales attention as for query_pre_attn_scalar {taken}, this model has {scalar}"


def output_head_warnings(model: HFModel) -> Iterator[str]:
    if "lm_head.weight" in model.tensors:
        yield "lm_head.weight is left out: llama.cpp takes the embedding as this family's output"
