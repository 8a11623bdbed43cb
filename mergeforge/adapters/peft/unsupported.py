"""PEFT methods that cannot be merged into a weight, each with the reason and what to do instead."""

from __future__ import annotations

_PROMPT = "it changes the input or the attention's keys and values, not the weights; load it with PEFT at run time"
_ROUTED = "a router decides at run time which of its parts apply; load it with PEFT at run time"
_FROM_BASE = (
    "it replaces singular directions of the base, so every weight would have to be decomposed; merge it with PEFT"
)
_NOT_YET = "this version does not support it; merge it with PEFT"

UNSUPPORTED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": _ROUTED,
    "SHADOW": "it runs a second model in parallel; load it with PEFT at run time",
    "PSOFT": _FROM_BASE,
    "TINYLORA": _FROM_BASE,
    "FROD": _FROM_BASE,
    "UNILORA": _NOT_YET,
    "ADAMSS": _NOT_YET,
    "WAVEFT": _NOT_YET,
}
