"""Key/values as a GGUF reader returns them, so that ours and those of a file can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergeforge.gguf.key_values import Value

_NAMES = {"u8": "UINT8", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "string": "STRING"}
Key = tuple[tuple[str, ...], Any]


def as_read(keys: Mapping[str, Value]) -> dict[str, Key]:
    """Key -> (type names, value), as read from a file with these keys."""
    return {key: (_types(value), _value(value)) for key, value in keys.items()}


def _types(value: Value) -> tuple[str, ...]:
    return ("ARRAY", _NAMES[value.items]) if value.kind == "array" else (_NAMES[value.kind],)


def _value(value: Value) -> Any:
    if value.kind == "array":
        return [_item(value.items, item) for item in value.value]
    return _item(value.kind, value.value)


def _item(kind: str, value: Any) -> Any:
    return float(np.float32(value)) if kind == "f32" else value


def with_prefix(keys: Mapping[str, Key], prefix: str) -> dict[str, Key]:
    return {key: value for key, value in keys.items() if key.startswith(prefix)}


def differences(ours: Mapping[str, Key], theirs: Mapping[str, Key]) -> dict[str, str]:
    """Key -> how ours and theirs differ, abridged; "order" if only the order does.

    llama.cpp's converter writes the names of chat templates as a set, so their order does not count.
    """
    differing: dict[str, str] = {}
    for key in {**theirs, **ours}:
        our_value, their_value = ours.get(key), theirs.get(key)
        if key == "tokenizer.chat_templates" and our_value and their_value:
            our_value, their_value = ((types, sorted(names)) for types, names in (our_value, their_value))
        if our_value != their_value:
            differing[key] = _describe(our_value, their_value)
    return differing or ({} if list(ours) == list(theirs) else {"order": f"{list(ours)} / {list(theirs)}"})


def _describe(ours: Key | None, theirs: Key | None) -> str:
    if ours is None or theirs is None or ours[0] != theirs[0] or not isinstance(ours[1], list):
        return f"ours {str(ours)[:200]}, theirs {str(theirs)[:200]}"
    items = list(zip(ours[1], theirs[1], strict=False))
    first = [f"{i}: {a!r}, {b!r}" for i, (a, b) in enumerate(items) if a != b][:3]
    return f"lengths {len(ours[1])}, {len(theirs[1])}; " + "; ".join(first)
