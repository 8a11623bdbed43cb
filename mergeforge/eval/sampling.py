"""How an answer is sampled: temperature and related settings, limits, stop strings, and presets by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mergeforge.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. `temperature` 0: always the most likely token; `top_k` 0 and `top_p` 1: no limit."""

    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise RecipeError(f"{name} {value:g} must be between {low:g} and {high:g}")


LIMITS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 20),
    "temperature": (0, 10),
    "top_p": (1e-6, 1),
    "top_k": (0, 1 << 20),
    "repetition_penalty": (0.01, 10),
}
GREEDY = Sampling(temperature=0)
PRESETS: dict[str, dict[str, Any]] = {
    "creative": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.05},
    "precise": {"temperature": 0.0, "top_p": 1.0},
    "long": {"temperature": 0.7, "top_p": 0.95, "max_tokens": 2048, "repetition_penalty": 1.05},
}


def preset(name: str) -> Sampling:
    """A preset by name. Raises RecipeError with the nearest name."""
    if name not in PRESETS:
        raise RecipeError(f"there is no preset '{name}'", hint=did_you_mean(name, PRESETS) or ", ".join(PRESETS))
    return Sampling(**PRESETS[name])


def with_setting(sampling: Sampling, name: str, text: str) -> Sampling:
    """`sampling` with one setting parsed from text; `stop` adds a stop string, `none` clears. Raises RecipeError."""
    known = [*LIMITS, "seed", "stop"]
    if name not in known:
        raise RecipeError(f"there is no setting '{name}'", hint=did_you_mean(name, known) or ", ".join(known))
    if name == "stop":
        stop = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
        return replace(sampling, stop=() if text == "none" else (*sampling.stop, stop))
    if name == "seed" and text == "none":
        return replace(sampling, seed=None)
    kind = float if name in ("temperature", "top_p", "repetition_penalty") else int
    try:
        value: Any = kind(text)
        return replace(sampling, **{name: value})
    except ValueError:
        raise RecipeError(f"{name} {text}: not {'an integer' if kind is int else 'a number'}") from None
