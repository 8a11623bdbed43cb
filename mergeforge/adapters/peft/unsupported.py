"""Adapter kinds that cannot be merged into a weight, each with the reason and what to do instead."""

from __future__ import annotations

_PROMPT = "it changes the input or the attention's keys and values, not the weights: load it with PEFT beside the model"
_ROUTED = "a router decides at run time which of its parts apply: load it with PEFT beside the model"
_FROM_BASE = "it replaces singular directions of the base, which takes decomposing every weight: merge it with PEFT"

REFUSED = {
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
    "SHADOW": "it runs a second model beside the first: load it with PEFT",
    "OSF": _FROM_BASE,
    "PSOFT": _FROM_BASE,
    "TINYLORA": _FROM_BASE,
    "FROD": _FROM_BASE,
    "PEANUT": "its change is a network's answer to the weight itself, which no row alone tells: merge it with PEFT",
    "DEFT": "its factors are of the original weight's whole product: merge it with PEFT",
    "UNILORA": "it is not supported by this version: merge it with PEFT",
    "ADAMSS": "it is not supported by this version: merge it with PEFT",
    "WAVEFT": "it is not supported by this version: merge it with PEFT",
}
