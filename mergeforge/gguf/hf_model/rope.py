"""Rules for the rope of a config: how many dimensions are rotated, and how it is scaled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mergeforge.gguf.hf_model.classes import HFClass
from mergeforge.gguf.hf_model.keys import ModelKeys

if TYPE_CHECKING:
    import numpy as np

_YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_ext_factor": "extrapolation_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_PARTIAL = ("partial_rotary_factor", "rotary_pct")


def rope_type(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Linear and yarn scaling, which keys describe."""
    kind = keys.get("rope.scaling.type")
    if kind not in ("linear", "yarn"):
        return
    rope = _full_rope(part)
    rope["rope_type"] = kind
    names = _YARN if kind == "yarn" else {"rope.scaling.factor": "factor"}
    rope |= {name: keys.get(key) for key, name in names.items() if keys.get(key) is not None}
    if (multiplier := keys.get("rope.scaling.yarn_log_multiplier")) is not None:
        scale = multiplier if entry.arch == "mistral3" else 10 * multiplier
        rope["mscale_all_dim"] = float(f"{scale:.6g}")
        rope.setdefault("mscale", rope["mscale_all_dim"])
    if (beta := keys.get("attention.temperature_scale")) is not None:
        rope["llama_4_scaling_beta"] = beta


def xdrope(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Hunyuan-VL: dynamic scaling by alpha, with sections for four coordinates."""
    alpha, sections_ = keys.get("rope.scaling.alpha"), keys.get("rope.dimension_sections")
    if alpha is not None and isinstance(sections_, list):
        rope = _rope(part)
        rope |= {"rope_type": "dynamic", "type": "dynamic", "alpha": alpha, "mrope_section": sections_}
        rope["factor"] = keys.get("rope.scaling.factor") or 1.0


def partial_rotation(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """The part of each head that is rotated."""
    rotated, rope = keys.get("rope.dimension_count"), _rope(part)
    size = keys.get("attention.key_length") or _divided(keys)
    if not rotated or not size or "qk_rope_head_dim" in part or entry.arch == "granitehybrid":
        return
    name = next((name for name in _PARTIAL if name in rope), next((name for name in _PARTIAL if name in part), ""))
    if name in rope:
        rope[name] = rotated / size
    if name in part:
        part[name] = rotated / size


def sections(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """mrope: dimensions for time, height and width."""
    counts, rope = keys.get("rope.dimension_sections"), _rope(part)
    if isinstance(counts, list) and ("mrope_section" in rope or entry.arch in ("qwen35", "qwen35moe")):
        rope["mrope_section"] = counts if counts[-1] else counts[:3]
        rope.setdefault("rope_type", "default")


def llama3(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """llama3 scaling, which GGUF has only as a tensor of divisors."""
    if "rope_freqs.weight" not in keys.shapes or entry.arch == "gemma4":
        return
    rope = _full_rope(part)
    theta = keys.get("rope.freq_base") or 10000.0
    if found := solve_llama3(keys.read("rope_freqs.weight"), float(theta)):
        rope |= {"rope_type": "llama3", "rope_theta": theta, **found}


def longrope(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """longrope, whose factors are tensors."""
    names = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
    rope = _rope(part)
    if all(tensor in keys.shapes for tensor in names.values()):
        factors = {name: [float(str(value)) for value in keys.read(tensor)] for name, tensor in names.items()}
        rope |= {"rope_type": "longrope", **factors}
        if context := keys.get("rope.scaling.original_context_length"):
            part["original_max_position_embeddings"] = context


def gemma4(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """Gemma 4: the first part of each head of full attention is rotated, the others have the divisor 1e30."""
    if entry.arch != "gemma4" or "rope_freqs.weight" not in keys.shapes:
        return
    divisors = keys.read("rope_freqs.weight")
    rope = _rope(part)
    full = dict(rope.get("full_attention") or {})
    full |= {"rope_type": "proportional", "partial_rotary_factor": float((divisors == 1).mean())}
    rope["full_attention"] = full


def solve_llama3(divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The parameters of llama3 rope that give these divisors; {} if none do.

    Between the two boundaries 1 / divisor is linear in the frequency. Only the ratios of low_freq_factor,
    high_freq_factor and the original context count, so the first is 1, as in all known models.
    """
    import numpy as np

    exact = divisors.astype(np.float64)
    waves = 2 * math.pi * theta ** (np.arange(len(exact)) / len(exact))
    factor = float(exact.max())
    between = (exact > 1) & (exact < factor * (1 - 1e-6))
    if factor <= 1:
        return {}
    if between.sum() < 2:
        return _guess_llama3(exact, waves, factor)
    smooth = (1 / exact[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(1 / waves[between], smooth, 1)
    spread = -1 / offset
    return _checked_llama3(exact, waves, factor, round(slope * spread), float(f"{1 + spread:.3g}"))


def _guess_llama3(exact: np.ndarray, waves: np.ndarray, factor: float) -> dict[str, Any]:
    """The usual parameters with a power of two as context."""
    found = (_checked_llama3(exact, waves, factor, 1 << bits, 4.0) for bits in range(20, 4, -1))
    return next((one for one in found if one), {})


def _checked_llama3(exact: np.ndarray, waves: np.ndarray, factor: float, context: int, high: float) -> dict[str, Any]:
    import numpy as np

    smooth = (context / waves - 1) / (high - 1)
    divisors = np.where(waves > context, factor, 1 / ((1 - smooth) / factor + smooth))
    divisors = np.where(waves < context / high, 1.0, divisors)
    if not np.allclose(divisors, exact, rtol=1e-4):
        return {}
    factor = float(f"{factor:.6g}")
    values = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
    return values | {"original_max_position_embeddings": context}


def _rope(part: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters (or rope_scaling, where the class has that), as the config's own."""
    name = "rope_scaling" if isinstance(part.get("rope_scaling"), dict) else "rope_parameters"
    part[name] = dict(part.get(name) or {})
    rope: dict[str, Any] = part[name]
    return rope


def _full_rope(part: dict[str, Any]) -> dict[str, Any]:
    """The rope of layers with full attention, which is the only one that is scaled."""
    rope = _rope(part)
    if not isinstance(rope.get("full_attention"), dict):
        return rope
    rope["full_attention"] = dict(rope["full_attention"])
    full: dict[str, Any] = rope["full_attention"]
    return full


def _divided(keys: ModelKeys) -> int:
    hidden, heads = keys.get("embedding_length"), keys.get("attention.head_count")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def base(part: dict[str, Any], keys: ModelKeys, entry: HFClass) -> None:
    """The base of frequencies belongs to every rope that is scaled; an empty one is left out."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = part.get(name)
        if isinstance(rope, dict) and not rope:
            part.pop(name)
    rope, theta = part.get("rope_parameters"), keys.get("rope.freq_base")
    if isinstance(rope, dict) and theta is not None and not any(isinstance(value, dict) for value in rope.values()):
        rope.setdefault("rope_theta", theta)


ROPE_RULES = (rope_type, xdrope, partial_rotation, sections, llama3, longrope, gemma4, base)
