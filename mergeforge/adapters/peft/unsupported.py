"""PEFT methods that cannot be merged into a weight, each with the reason and what to do instead."""

from __future__ import annotations

_PROMPT = "it changes the input or the attention's keys and values, not the weights; load it with PEFT at run time"
_ROUTED = "a router decides at run time which of its parts apply; load it with PEFT at run time"

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
}
