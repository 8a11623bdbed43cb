"""Key/values as a GGUF reader gives them back, so that ours and a file's can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergeforge.gguf.key_values import Value

_NAMES = {"u8": "UINT8", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "string": "STRING"}
Key = tuple[tuple[str, ...], Any]


def as_read(keys: Mapping[str, Value]) -> dict[str, Key]:
    """Key -> (type names, value): what reading a file with these keys gives."""
    return {key: (_types(value), _value(value)) for key, value in keys.items()}


def _types(value: Value) -> tuple[str, ...]:
    return ("ARRAY", _NAMES[value.items]) if value.kind == "array" else (_NAMES[value.kind],)


def _value(value: Value) -> Any:
    if value.kind == "array":
        return [_one(value.items, one) for one in value.value]
    return _one(value.kind, value.value)


def _one(kind: str, value: Any) -> Any:
    return float(np.float32(value)) if kind == "f32" else value


def some(keys: Mapping[str, Key], prefix: str) -> dict[str, Key]:
    return {key: value for key, value in keys.items() if key.startswith(prefix)}


def differences(ours: Mapping[str, Key], theirs: Mapping[str, Key]) -> dict[str, str]:
    """Key -> what differs, short; "order" when only that does. Names of chat templates are a set there."""
    found: dict[str, str] = {}
    for key in {**theirs, **ours}:
        one, two = ours.get(key), theirs.get(key)
        if key == "tokenizer.chat_templates" and one and two:
            one, two = (one[0], sorted(one[1])), (two[0], sorted(two[1]))
        if one != two:
            found[key] = _shown(one, two)
    return found or ({} if list(ours) == list(theirs) else {"order": f"{list(ours)} / {list(theirs)}"})


def _shown(one: Key | None, two: Key | None) -> str:
    if one is None or two is None or one[0] != two[0] or not isinstance(one[1], list):
        return f"ours {str(one)[:200]}, theirs {str(two)[:200]}"
    at = [i for i, (a, b) in enumerate(zip(one[1], two[1], strict=False)) if a != b][:3]
    return f"lengths {len(one[1])}, {len(two[1])}; " + "; ".join(f"{i}: {one[1][i]!r}, {two[1][i]!r}" for i in at)
